"""Calls through the gateway behave as calls to the service itself: kinds, metadata, deadline, cancel, errors, trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.trace import SpanKind

from gateway.forwarding import FORWARDED, ForwardedHealth, Forwarder
from smeltkit.errors import EngineUnavailable, ServiceUnavailable, Timeout, Unimplemented, UnknownModel
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.telemetry import span
from smeltkit.testing.rpc import serving
from smeltkit.testing.spans import captured_spans
from smeltkit.testing.waiting import eventually

UNARY = "/smelt.sandbox.v1.SandboxService/Judge"
SERVER_STREAM = "/smelt.sandbox.v1.SandboxService/Describe"
CLIENT_STREAM = "/smelt.sandbox.v1.SandboxService/LaterRelease"
BOTH_STREAMS = "/smelt.sandbox.v1.SandboxService/JudgeBatch"


@asynccontextmanager
async def through_gateway(
    handlers: dict[str, Any], *, token: str = "", service_token: str = ""
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a gateway that forwards the sandbox's calls to a server with these handlers."""
    async with (
        serving(handlers, token=service_token) as service,
        _gateway(service.address, token, service_token) as host,
        open_channel(host.address, token=token, is_retrying=False) as channel,
    ):
        yield channel


@asynccontextmanager
async def _gateway(address: str, token: str = "", service_token: str = "") -> AsyncIterator[ServiceHost]:
    async with open_channel(address, token=service_token, is_retrying=False) as outgoing:
        channels = {"sandbox": outgoing}
        host = ServiceHost("gateway", RpcConfig(token=token), health_servicer=ForwardedHealth(channels))
        host.add_generic(Forwarder(channels), *FORWARDED)
        host.set_ready(True)
        await host.start()
        yield host
        await host.stop()


async def _requests() -> AsyncIterator[bytes]:
    for body in (b"a", b"b", b"c"):
        yield body


async def test_all_four_kinds_of_call_pass() -> None:
    """Messages arrive as the bytes that were sent, in order."""

    async def unary(request: bytes, context: Any) -> bytes:
        return request + b"!"

    async def server_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield request

    async def client_stream(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([body async for body in requests])

    async def both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for body in requests:
            yield body.upper()

    handlers = {
        UNARY: grpc.unary_unary_rpc_method_handler(unary),
        SERVER_STREAM: grpc.unary_stream_rpc_method_handler(server_stream),
        CLIENT_STREAM: grpc.stream_unary_rpc_method_handler(client_stream),
        BOTH_STREAMS: grpc.stream_stream_rpc_method_handler(both),
    }
    async with through_gateway(handlers) as channel:
        assert await call(channel.unary_unary(UNARY), b"x", timeout_s=5) == b"x!"
        assert await call(channel.stream_unary(CLIENT_STREAM), _requests(), timeout_s=5) == b"abc"
        async with stream(channel.unary_stream(SERVER_STREAM), b"x", timeout_s=5) as replies:
            assert [reply async for reply in replies] == [b"x", b"x", b"x"]
        async with stream(channel.stream_stream(BOTH_STREAMS), _requests(), timeout_s=5) as replies:
            assert [reply async for reply in replies] == [b"A", b"B", b"C"]


async def test_replies_pass_one_by_one() -> None:
    """A stream is not collected on the way: a reply arrives before the next request is sent."""

    async def both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for body in requests:
            yield body

    async with through_gateway({BOTH_STREAMS: grpc.stream_stream_rpc_method_handler(both)}) as channel:
        talk = channel.stream_stream(BOTH_STREAMS)(timeout=10)
        for body in (b"1", b"2"):
            await talk.write(body)
            assert await talk.read() == body
        await talk.done_writing()
        assert await talk.read() is grpc.aio.EOF


async def test_error_passes_with_its_reason_details_and_time_to_wait() -> None:
    """The client raises the class that the service raised."""

    async def failing(request: bytes, context: Any) -> bytes:
        raise EngineUnavailable("the engine restarts", details={"engine": "llama"}, retry_after_s=2)

    async with through_gateway({UNARY: grpc.unary_unary_rpc_method_handler(failing)}) as channel:
        with pytest.raises(EngineUnavailable) as caught:
            await call(channel.unary_unary(UNARY), b"", timeout_s=5)
    assert (caught.value.message, caught.value.details) == ("the engine restarts", {"engine": "llama"})
    assert caught.value.retry_after_s == 2


async def test_error_after_the_first_reply_passes() -> None:
    """A stream that breaks gives what came before and then the error."""

    async def breaking(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise UnknownModel("gone")

    async with (
        through_gateway({SERVER_STREAM: grpc.unary_stream_rpc_method_handler(breaking)}) as channel,
        stream(channel.unary_stream(SERVER_STREAM), b"", timeout_s=5) as replies,
    ):
        assert await anext(replies) == b"first"
        with pytest.raises(UnknownModel):
            await anext(replies)


async def test_cancel_reaches_the_service() -> None:
    """A client that leaves frees what the service holds."""
    freed = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"token"
                await asyncio.sleep(0.001)
        finally:
            freed.set()

    async with through_gateway({SERVER_STREAM: grpc.unary_stream_rpc_method_handler(endless)}) as channel:
        async with stream(channel.unary_stream(SERVER_STREAM), b"", timeout_s=60) as replies:
            await anext(replies)
        await asyncio.wait_for(freed.wait(), 5)


async def test_deadline_passes_and_ends_the_call() -> None:
    """The service sees what time is left, and the client gets a timeout."""
    seen = []

    async def never(request: bytes, context: Any) -> bytes:
        seen.append(context.time_remaining())
        await asyncio.Event().wait()
        return b""

    async with through_gateway({UNARY: grpc.unary_unary_rpc_method_handler(never)}) as channel:
        with pytest.raises(Timeout):
            await call(channel.unary_unary(UNARY), b"", timeout_s=0.5)
    assert 0 < seen[0] <= 0.5


async def test_metadata_passes_in_both_directions_and_tokens_do_not() -> None:
    """Text and binary metadata go through; each hop has its own token."""

    async def telling(request: bytes, context: Any) -> bytes:
        received = dict(context.invocation_metadata())
        await context.send_initial_metadata((("x-first", "1"),))
        context.set_trailing_metadata((("x-last-bin", received["x-given-bin"]),))
        return str(received["authorization"]).encode()

    handlers = {UNARY: grpc.unary_unary_rpc_method_handler(telling)}
    async with through_gateway(handlers, token="outer", service_token="inner") as channel:
        metadata = grpc.aio.Metadata(("x-given-bin", b"\x00\xff"))
        running = channel.unary_unary(UNARY)(b"", timeout=5, metadata=metadata)
        assert await running == b"Bearer inner"
        assert ("x-first", "1") in list(await running.initial_metadata())
        assert ("x-last-bin", b"\x00\xff") in list(await running.trailing_metadata())


async def test_trace_runs_through_the_gateway() -> None:
    """Client, gateway and service stand in one trace, each the child of the one before."""

    async def reply(request: bytes, context: Any) -> bytes:
        return b""

    async with through_gateway({UNARY: grpc.unary_unary_rpc_method_handler(reply)}) as channel:
        with captured_spans() as captured:
            with span("command"):
                await call(channel.unary_unary(UNARY), b"", timeout_s=5)
            await eventually(lambda: len(captured.named(UNARY[1:])) == 4)
            by_id = {recorded.context.span_id: recorded for recorded in captured.all()}
            current = next(item for item in captured.named(UNARY[1:]) if item.parent.span_id not in _ids(by_id, UNARY))
            kinds = [current.kind]
            while child := next((item for item in by_id.values() if _is_child(item, current)), None):
                kinds.append(child.kind)
                current = child
    assert kinds == [SpanKind.CLIENT, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER]


def _ids(by_id: dict[int, Any], method: str) -> set[int]:
    return {span_id for span_id, recorded in by_id.items() if recorded.name == method[1:]}


def _is_child(child: Any, parent: Any) -> bool:
    return child.parent is not None and child.parent.span_id == parent.context.span_id


async def test_absent_service_is_named_and_its_address_is_not() -> None:
    """The message says which service is away and what to do."""
    async with _gateway("127.0.0.1:1") as host, open_channel(host.address, is_retrying=False) as channel:
        with pytest.raises(ServiceUnavailable) as caught:
            await call(channel.unary_unary(UNARY), b"", timeout_s=5)
    assert "sandbox" in caught.value.message and "smelt status" in caught.value.message
    assert "127.0.0.1" not in caught.value.message


@pytest.mark.parametrize("method", ["/smelt.unknown.v1.X/Y", "/other.Service/Call", "/smelt.sandbox/Judge", "/x/y"])
async def test_method_of_no_service_is_unimplemented(method: str) -> None:
    """Nothing but the five services is passed on."""
    async with through_gateway({}) as channel:
        with pytest.raises(Unimplemented):
            await call(channel.unary_unary(method), b"", timeout_s=5)


async def test_health_of_a_service_is_asked_at_the_service() -> None:
    """One that does not answer is not serving; the gateway's own health is its own."""
    async with _gateway("127.0.0.1:1") as host, open_channel(host.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        own = await check(health_pb2.HealthCheckRequest())
        theirs = await check(health_pb2.HealthCheckRequest(service="smelt.sandbox.v1.SandboxService"))
        watching = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="smelt.sandbox.v1.SandboxService")
        )
        watched = [reply.status async for reply in watching]
    assert own.status == health_pb2.HealthCheckResponse.SERVING
    assert theirs.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert watched == [health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_reflection_describes_the_forwarded_services() -> None:
    """A tool that knows only the gateway's address can list and call everything."""
    async with _gateway("127.0.0.1:1") as host, open_channel(host.address) as channel:
        explore = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        symbol = "smelt.evaluator.v1.EvaluatorService"
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        asked.append(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        answers = [answer async for answer in explore(iter(asked))]
    assert set(FORWARDED) <= {service.name for service in answers[0].list_services_response.service}
    assert answers[1].file_descriptor_response.file_descriptor_proto
