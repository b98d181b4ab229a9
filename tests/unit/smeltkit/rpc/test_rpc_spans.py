"""Spans and metrics of calls carry the status that the caller really got, for every kind of call and of ending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from smelt.inference.v1 import inference_pb2
from smelt.sandbox.v1 import sandbox_pb2

from smeltkit.errors import EngineUnavailable, SmeltError, Timeout, UnknownModel
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.telemetry import names, span
from smeltkit.testing.rpc import serving
from smeltkit.testing.spans import CapturedSpans, captured_spans, metric_points
from smeltkit.testing.waiting import eventually

_SANDBOX = sandbox_pb2.DESCRIPTOR.services_by_name["SandboxService"].full_name
_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
UNARY = f"/{_SANDBOX}/Judge"
SERVER_STREAM = f"/{_INFERENCE}/Generate"
CLIENT_STREAM = f"/{_SANDBOX}/Execute"
BOTH_STREAMS = f"/{_SANDBOX}/JudgeBatch"


async def _requests() -> AsyncIterator[bytes]:
    yield b"a"
    yield b"b"


async def _reply(request: Any, context: Any) -> bytes:
    return b"reply"


async def _replies(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


async def _reply_to_all(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b"".join([request async for request in requests])


async def _replies_to_all(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    assert [request async for request in requests] == [b"a", b"b"]
    yield b"one"
    yield b"two"


async def _spans(captured: CapturedSpans, method: str) -> dict[SpanKind, ReadableSpan]:
    """The client's and the server's span of the one call of `method`, as soon as both ended."""
    name = method.lstrip("/")
    await eventually(lambda: len(captured.named(name)) == 2)
    return {recorded.kind: recorded for recorded in captured.named(name)}


def _status(recorded: ReadableSpan) -> tuple[Any, StatusCode]:
    return (recorded.attributes or {})[names.RPC_STATUS], recorded.status.status_code


HANDLERS = {
    UNARY: grpc.unary_unary_rpc_method_handler(_reply),
    SERVER_STREAM: grpc.unary_stream_rpc_method_handler(_replies),
    CLIENT_STREAM: grpc.stream_unary_rpc_method_handler(_reply_to_all),
    BOTH_STREAMS: grpc.stream_stream_rpc_method_handler(_replies_to_all),
}


@pytest.mark.parametrize("method", HANDLERS)
async def test_each_kind_of_call_has_a_client_and_a_server_span_in_one_trace(method: str) -> None:
    """The server's span is a child of the client's, which is a child of what was current."""
    async with serving(HANDLERS) as host, open_channel(host.address) as channel:
        with captured_spans() as captured, span("root"):
            if method == UNARY:
                await call(channel.unary_unary(method), b"", timeout_s=5)
            elif method == CLIENT_STREAM:
                await call(channel.stream_unary(method), _requests(), timeout_s=5)
            else:
                kind, request = (
                    (channel.unary_stream, b"") if method == SERVER_STREAM else (channel.stream_stream, _requests())
                )
                async with stream(kind(method), request, timeout_s=5) as replies:
                    assert [reply async for reply in replies] == [b"one", b"two"]
        spans = await _spans(captured, method)
    client, server, root = spans[SpanKind.CLIENT], spans[SpanKind.SERVER], captured.named("root")[0]
    assert server.parent.span_id == client.context.span_id
    assert client.parent.span_id == root.context.span_id
    assert {_status(client), _status(server)} == {("OK", StatusCode.UNSET)}


@pytest.mark.parametrize(
    "error,server_status",
    [(UnknownModel("none"), StatusCode.UNSET), (EngineUnavailable("gone"), StatusCode.ERROR)],
    ids=["caller's fault", "server's fault"],
)
async def test_raised_error_is_the_status_of_both_spans(error: SmeltError, server_status: StatusCode) -> None:
    """The server's span is failed only by what is the server's fault, the client's by any failure."""

    async def failing(request: bytes, context: Any) -> bytes:
        raise error

    with captured_spans() as captured:
        async with (
            serving({UNARY: grpc.unary_unary_rpc_method_handler(failing)}) as host,
            open_channel(host.address, is_retrying=False) as channel,
        ):
            with pytest.raises(type(error)):
                await call(channel.unary_unary(UNARY), b"", timeout_s=5)
            spans = await _spans(captured, UNARY)
    assert _status(spans[SpanKind.SERVER]) == (error.grpc_status, server_status)
    assert spans[SpanKind.SERVER].attributes[names.ERROR_TYPE] == error.reason()
    assert _status(spans[SpanKind.CLIENT]) == (error.grpc_status, StatusCode.ERROR)


async def test_abort_keeps_its_status() -> None:
    """A handler that aborts by itself is recorded with the code it gave."""

    async def aborting(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.DATA_LOSS, "lost")
        return b""

    with captured_spans() as captured:
        async with (
            serving({UNARY: grpc.unary_unary_rpc_method_handler(aborting)}) as host,
            open_channel(host.address) as channel,
        ):
            with pytest.raises(SmeltError):
                await call(channel.unary_unary(UNARY), b"", timeout_s=5)
            spans = await _spans(captured, UNARY)
    assert _status(spans[SpanKind.SERVER]) == ("DATA_LOSS", StatusCode.ERROR)


async def test_unexpected_exception_is_internal_and_its_message_stays_out() -> None:
    """Neither span tells what the exception said."""

    async def broken(request: bytes, context: Any) -> bytes:
        raise ValueError("a prompt")

    with captured_spans() as captured:
        async with (
            serving({UNARY: grpc.unary_unary_rpc_method_handler(broken)}) as host,
            open_channel(host.address) as channel,
        ):
            with pytest.raises(SmeltError):
                await call(channel.unary_unary(UNARY), b"", timeout_s=5)
            spans = await _spans(captured, UNARY)
    assert _status(spans[SpanKind.SERVER]) == ("INTERNAL", StatusCode.ERROR)
    assert all("a prompt" not in recorded.to_json() for recorded in spans.values())


async def test_left_stream_is_cancelled_on_both_sides_and_its_generator_closed() -> None:
    """Leaving `stream` reaches the handler's `finally` at once, and both spans say CANCELLED."""
    closed = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"token"
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    with captured_spans() as captured:
        async with (
            serving({SERVER_STREAM: grpc.unary_stream_rpc_method_handler(endless)}) as host,
            open_channel(host.address) as channel,
        ):
            async with stream(channel.unary_stream(SERVER_STREAM), b"", timeout_s=60) as replies:
                await anext(replies)
            await asyncio.wait_for(closed.wait(), 5)
            spans = await _spans(captured, SERVER_STREAM)
    assert _status(spans[SpanKind.SERVER])[0] == "CANCELLED"
    assert _status(spans[SpanKind.CLIENT])[0] == "CANCELLED"


async def test_expired_call_says_deadline_exceeded_on_both_sides() -> None:
    """A deadline is no cancellation, although the handler sees both alike."""

    async def never(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    with captured_spans() as captured:
        async with (
            serving({UNARY: grpc.unary_unary_rpc_method_handler(never)}) as host,
            open_channel(host.address) as channel,
        ):
            with pytest.raises(Timeout):
                await call(channel.unary_unary(UNARY), b"", timeout_s=0.3)
            spans = await _spans(captured, UNARY)
    assert _status(spans[SpanKind.SERVER]) == ("DEADLINE_EXCEEDED", StatusCode.ERROR)
    assert _status(spans[SpanKind.CLIENT]) == ("DEADLINE_EXCEEDED", StatusCode.ERROR)


async def test_durations_carry_method_and_status_and_no_invented_name() -> None:
    """A method that no proto declares is counted as _OTHER, so callers cannot make new series."""
    metric_points(names.RPC_SERVER_DURATION.name)
    handlers = {**HANDLERS, "/invented/Name": grpc.unary_unary_rpc_method_handler(_reply)}
    async with serving(handlers) as host, open_channel(host.address) as channel:
        await call(channel.unary_unary(UNARY), b"", timeout_s=5)
        await call(channel.unary_unary("/invented/Name"), b"", timeout_s=5)
    points = metric_points(names.RPC_SERVER_DURATION.name)
    assert {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: UNARY[1:], names.RPC_STATUS: "OK"} in points
    methods = {point[names.RPC_METHOD] for point in points}
    assert "_OTHER" in methods and "invented/Name" not in methods


async def test_a_probe_of_health_is_counted_so_an_idle_service_sends_a_series() -> None:
    """What the rules take for "metrics arrive" (`scripts.manifests.series.ARRIVES`)."""
    async with serving(HANDLERS) as host, open_channel(host.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    methods = {point[names.RPC_METHOD] for point in metric_points(names.RPC_SERVER_DURATION.name)}
    assert "grpc.health.v1.Health/Check" in methods
