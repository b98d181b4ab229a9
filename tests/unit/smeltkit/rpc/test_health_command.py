"""The probe without a shell: its exit code is the health of the process that it asks."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from smeltkit.rpc.server import RpcConfig, ServiceHost


async def _code(address: str) -> int:
    command = (sys.executable, "-m", "smeltkit.rpc.health", address)
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.DEVNULL)
    return await process.wait()


async def test_the_exit_code_follows_the_health_of_the_process() -> None:
    host = ServiceHost("tested", RpcConfig(token="asked-of-callers-not-of-probes"))
    await host.start()
    assert await _code(host.address) == 1
    host.set_ready(True)
    await asyncio.sleep(0)
    assert await _code(host.address) == 0
    await host.stop()
    assert await _code(host.address) == 1
