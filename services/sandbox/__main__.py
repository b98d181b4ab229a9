"""Runs the sandbox service: `python -m services.sandbox`."""

from __future__ import annotations

import gc

from smelt.sandbox.v1 import sandbox_pb2_grpc

from services.sandbox.config import SandboxConfig
from services.sandbox.sandbox import open_sandbox
from services.sandbox.servicer import SandboxServicer
from smeltkit.config import from_environment
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service


async def serve() -> None:
    """Serves until SIGTERM; raises IsolationTooWeak instead of serving below the configured level."""
    config = from_environment(SandboxConfig, "SMELT_SANDBOX_")
    host = ServiceHost("sandbox", from_environment(RpcConfig, "SMELT_RPC_"))
    sandbox = await open_sandbox(config)
    try:
        add = sandbox_pb2_grpc.add_SandboxServiceServicer_to_server
        host.add("smelt.sandbox.v1.SandboxService", add, SandboxServicer(sandbox))
        host.set_ready(True)
        gc.collect()
        gc.freeze()
        await host.run(lambda stopping: sandbox.watch(stopping, host.set_ready))
    finally:
        await sandbox.close()


if __name__ == "__main__":
    run_service("sandbox", serve)
