"""Whether a component does its work, asked in its own language; and waiting until it does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.stack.components import Component
from gateway.stack.process import ProcessRecord, is_running, log_tail
from smeltkit import limits
from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.errors import StackDown, Timeout
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig


async def is_healthy(name: str, address: str) -> bool:
    """Whether this component answers within STACK_CHECK_TIMEOUT_S as one that works."""
    checks = {"nats": _nats_answers, "s3": _s3_answers}
    answer = checks[name](address) if name in checks else _service_serves(name, address)
    try:
        return await asyncio.wait_for(answer, limits.STACK_CHECK_TIMEOUT_S)
    except (TimeoutError, OSError, grpc.aio.AioRpcError, httpx.HTTPError):
        return False


async def wait_healthy(component: Component, record: ProcessRecord, log_path: Path) -> None:
    """Returns once the component is healthy. StackDown if it ended, Timeout if it does not come; both quote the log."""
    deadline = time.monotonic() + limits.SERVER_START_TIMEOUT_S
    while not await is_healthy(component.name, component.address):
        if not is_running(record):
            raise StackDown(f"{component.name} ended while it was starting; {log_tail(log_path)}")
        if time.monotonic() > deadline:
            seconds = f"{limits.SERVER_START_TIMEOUT_S:g} s"
            raise Timeout(f"{component.name} is not healthy after {seconds}; {log_tail(log_path)}")
        await asyncio.sleep(limits.STACK_POLL_S)


async def wait_writable(platform: PlatformConfig) -> None:
    """Returns once the object store has its bucket and takes a write: it may answer before it can."""
    store, deadline = S3Store(platform), time.monotonic() + limits.SERVER_START_TIMEOUT_S
    while not await asyncio.to_thread(store.takes_writes):
        if time.monotonic() > deadline:
            raise Timeout(f"s3 takes no writes after {limits.SERVER_START_TIMEOUT_S:g} s; see its log")
        await asyncio.sleep(limits.STACK_POLL_S)


async def _nats_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        return (await reader.readline()).startswith(b"INFO ")
    finally:
        writer.close()


async def _s3_answers(address: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, timeout=limits.STACK_CHECK_TIMEOUT_S) as client:
        return (await client.get(f"http://{address}/")).status_code < 500


async def _service_serves(name: str, address: str) -> bool:
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
    identity = from_environment(RpcConfig, "SMELT_RPC_").identity()
    async with open_channel(address, identity=identity, peer=name, is_retrying=False) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=limits.STACK_CHECK_TIMEOUT_S)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
