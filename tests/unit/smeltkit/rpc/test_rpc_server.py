"""A service host: health, reflection, ports, bounds, and a drain that lets running calls end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smelt.trainer.v1 import trainer_pb2_grpc

from smeltkit import limits
from smeltkit.errors import BadConfig, InternalError, PortTaken, SmeltError, TooManyRequests
from smeltkit.rpc.channel import call, open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.testing.rpc import Handlers, serving
from smeltkit.testing.waiting import eventually

UNARY = "/smelt.sandbox.v1.SandboxService/Judge"
WATCH = "/smelt.job.v1.JobService/WatchJob"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def _echo(request: bytes, context: Any) -> bytes:
    return request


async def _health(address: str, service: str = "") -> int:
    async with open_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return int((await check(health_pb2.HealthCheckRequest(service=service))).status)


async def test_health_follows_readiness_for_each_service() -> None:
    """A host starts as not serving; every service of it and the empty name change together."""
    host = ServiceHost("tested", RpcConfig())
    name = "smelt.trainer.v1.TrainerService"
    host.add(name, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, trainer_pb2_grpc.TrainerServiceServicer())
    await host.start()
    assert [await _health(host.address, service) for service in ("", name)] == [NOT_SERVING] * 2
    host.set_ready(True)
    await asyncio.sleep(0)
    assert [await _health(host.address, service) for service in ("", name)] == [SERVING] * 2
    await host.stop()


async def test_watch_needs_no_deadline() -> None:
    """Watching health or a job may last as long as it takes."""

    async def states(request: bytes, context: Any) -> Any:
        yield b"running"

    handlers = {WATCH: grpc.unary_stream_rpc_method_handler(states)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        assert [reply async for reply in channel.unary_stream(WATCH)(b"")] == [b"running"]
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == SERVING
        watching.cancel()


async def test_reflection_lists_the_services_without_a_deadline() -> None:
    """Tools that explore set no deadline."""
    host = ServiceHost("tested", RpcConfig())
    servicer = trainer_pb2_grpc.TrainerServiceServicer()
    name = "smelt.trainer.v1.TrainerService"
    host.add(name, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer)
    await host.start()
    async with open_channel(host.address) as channel:
        explore = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        asked = explore(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answers = [answer async for answer in asked]
    await host.stop()
    assert name in {service.name for answer in answers for service in answer.list_services_response.service}


async def test_second_server_on_a_port_is_refused() -> None:
    """Two servers never share a port unnoticed."""
    async with serving({}) as host:
        with pytest.raises(PortTaken):
            await ServiceHost("second", RpcConfig(listen=host.address)).start()


@pytest.mark.parametrize("listen", ["", "host", "127.0.0.1:x", ":1", "127.0.0.1:65536"])
def test_bad_listen_address_is_refused(listen: str) -> None:
    """The address is checked before anything is bound."""
    with pytest.raises(BadConfig):
        RpcConfig(listen=listen)


async def test_reply_above_the_bound_is_refused_by_the_receiver() -> None:
    """Files and tensors do not travel by gRPC."""

    async def big(request: bytes, context: Any) -> bytes:
        return bytes(limits.MESSAGE_MAX_BYTES + 1)

    handlers = {UNARY: grpc.unary_unary_rpc_method_handler(big)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        with pytest.raises(TooManyRequests):
            await call(channel.unary_unary(UNARY), b"", timeout_s=10)


async def test_call_beyond_the_bound_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service holds so many calls and no more; the next one learns to try later."""
    monkeypatch.setattr(limits, "CONCURRENT_CALLS_MAX", 1)
    entered = asyncio.Event()

    async def waiting(request: bytes, context: Any) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        return b""

    handlers = {UNARY: grpc.unary_unary_rpc_method_handler(waiting)}
    async with serving(handlers, drain_grace_s=0) as host, open_channel(host.address) as channel:
        first = channel.unary_unary(UNARY)(b"", timeout=30)
        await entered.wait()
        with pytest.raises(TooManyRequests):
            await call(channel.unary_unary(UNARY), b"", timeout_s=10)
        first.cancel()


async def test_running_call_ends_while_new_ones_are_refused_during_the_drain() -> None:
    """Drain: callbacks first, running calls finish, nothing new gets in."""
    entered, release, order = asyncio.Event(), asyncio.Event(), []

    async def slow(request: bytes, context: Any) -> bytes:
        entered.set()
        await release.wait()
        return b"done"

    async def callback() -> None:
        order.append(await _health(host.address))

    host = ServiceHost("tested", RpcConfig())
    host.add_generic(Handlers({UNARY: grpc.unary_unary_rpc_method_handler(slow)}))
    host.on_drain(callback)
    host.set_ready(True)
    await host.start()
    async with open_channel(host.address) as channel:
        running = asyncio.create_task(call(channel.unary_unary(UNARY), b"", timeout_s=30))
        await entered.wait()
        stopping = asyncio.create_task(host.stop())
        await eventually(lambda: order)
        async with open_channel(host.address, is_retrying=False) as late:
            with pytest.raises(SmeltError):
                await call(late.unary_unary(UNARY), b"", timeout_s=5)
        release.set()
        assert await running == b"done"
        await stopping
    assert order == [NOT_SERVING]


async def test_a_call_that_crosses_with_the_goodbye_of_a_server_is_made_again() -> None:
    """R-120: a server that stops answers it with CANCELLED, which nobody asked for."""
    asked = 0

    async def stopping(request: bytes, context: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "")
        yield b"done"

    handlers = {WATCH: grpc.unary_stream_rpc_method_handler(stopping)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        assert [reply async for reply in channel.unary_stream(WATCH)(b"")] == [b"done"]


async def test_handler_that_cleans_up_after_its_client_left_is_waited_for() -> None:
    """The server library forgets handlers of cancelled calls; the drain does not."""
    entered, cleaned = asyncio.Event(), asyncio.Event()

    async def cleaning(request: bytes, context: Any) -> bytes:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.2)
            cleaned.set()
        return b""

    handlers = {UNARY: grpc.unary_unary_rpc_method_handler(cleaning)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        running = channel.unary_unary(UNARY)(b"", timeout=30)
        await entered.wait()
        running.cancel()
        await asyncio.sleep(0.05)
    assert cleaned.is_set()


async def test_run_serves_until_the_signal_and_stops_its_background_work() -> None:
    """SIGTERM ends `run`: background tasks see their event."""
    stopped = []

    async def background(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        stopped.append(True)

    host = ServiceHost("tested", RpcConfig())
    await asyncio.wait_for(host.run(background), 20)
    assert stopped == [True]


async def test_failed_background_work_ends_the_process_with_its_error() -> None:
    """A service whose worker died does not go on answering as if it were healthy."""

    async def failing(stop: asyncio.Event) -> None:
        raise InternalError("gone")

    with pytest.raises(InternalError):
        await asyncio.wait_for(ServiceHost("tested", RpcConfig()).run(failing), 20)


async def test_proxy_variables_do_not_reach_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy for the web is not one for calls between services."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    handlers = {UNARY: grpc.unary_unary_rpc_method_handler(_echo)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        assert await call(channel.unary_unary(UNARY), b"x", timeout_s=10) == b"x"
