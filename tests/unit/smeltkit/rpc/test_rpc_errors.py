"""Errors cross the wire as their own class, and nothing else crosses."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import grpc
import pytest

from smeltkit import limits
from smeltkit.errors import (
    BadRequest,
    BadToken,
    CallerDenied,
    DeadlineRequired,
    InternalError,
    ServiceUnavailable,
    SmeltError,
    Timeout,
    TooManyRequests,
    Unimplemented,
    UnknownModel,
    all_errors,
)
from smeltkit.rpc.channel import call, open_channel
from smeltkit.rpc.status import from_rpc_error, to_grpc_status
from smeltkit.testing.rpc import serving

UNARY = "/smelt.sandbox.v1.SandboxService/Judge"


def _raising(error: Exception) -> dict[str, Any]:
    async def handler(request: bytes, context: Any) -> NoReturn:
        raise error

    return {UNARY: grpc.unary_unary_rpc_method_handler(handler)}


async def _failure(address: str, *, token: str = "") -> SmeltError:
    async with open_channel(address, token=token, is_retrying=False) as channel:
        with pytest.raises(SmeltError) as caught:
            await call(channel.unary_unary(UNARY), b"", timeout_s=5)
    return caught.value


async def test_error_arrives_as_the_class_that_was_raised() -> None:
    """Reason, message, details and the time to wait are all there."""
    raised = TooManyRequests("the queue holds 64 requests", details={"queue": "64"}, retry_after_s=1.5)
    async with serving(_raising(raised)) as host:
        error = await _failure(host.address)
    assert type(error) is TooManyRequests
    assert (error.message, error.details, error.retry_after_s) == (raised.message, {"queue": "64"}, 1.5)


@pytest.mark.parametrize(
    "kind", sorted(all_errors().values(), key=lambda kind: kind.reason()), ids=lambda c: c.reason()
)
def test_every_error_survives_the_round_trip(kind: type[SmeltError]) -> None:
    """Status and details of each class decode to that class again."""
    status: Any = to_grpc_status(kind("what happened", details={"value": "7"}))
    code, metadata = status.code, grpc.aio.Metadata(*status.trailing_metadata)
    decoded = from_rpc_error(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details=status.details))
    assert type(decoded) is kind
    assert (decoded.message, decoded.details) == ("what happened", {"value": "7"})


async def test_unexpected_exception_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets a correlation id; message and class stay in the service's log under that id."""
    async with serving(_raising(FileNotFoundError("/home/someone/secret"))) as host:
        error = await _failure(host.address)
    assert type(error) is InternalError
    assert "secret" not in error.message and "FileNotFound" not in error.message
    record = next(record for record in caplog.records if record.exc_info)
    assert vars(record)["correlation_id"] == error.details["correlation_id"]
    assert "secret" in str(record.exc_info[1])


async def test_long_message_is_cut_instead_of_breaking_the_call() -> None:
    """Headers have a bound; a message of 100 000 two-byte characters still arrives, shortened."""
    async with serving(_raising(UnknownModel("\u00e9" * 100_000, details={"name": "x" * 100_000}))) as host:
        error = await _failure(host.address)
    assert type(error) is UnknownModel
    assert len(error.message.encode()) <= limits.ERROR_MESSAGE_MAX_BYTES
    assert error.details["name"].endswith("...")


async def test_undeclared_method_is_unimplemented() -> None:
    """A method that the service does not serve gives the family of its status code."""
    async with serving({}) as host:
        assert type(await _failure(host.address)) is Unimplemented


async def test_absent_service_is_unavailable() -> None:
    """Nobody listens: the message names the method."""
    error = await _failure("127.0.0.1:1")
    assert type(error) is ServiceUnavailable
    assert "SandboxService/Judge" in error.message


async def test_call_without_deadline_is_refused() -> None:
    """A caller that sets no deadline learns that every call needs one."""
    async with serving(_raising(AssertionError("reached"))) as host, open_channel(host.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(UNARY)(b"")
    assert type(from_rpc_error(caught.value)) is DeadlineRequired


async def test_client_refuses_a_call_without_a_real_timeout() -> None:
    """Zero, negative and endless timeouts are refused before anything is sent."""
    async with open_channel("127.0.0.1:1") as channel:
        for timeout_s in (0, -1, limits.CALL_TIMEOUT_MAX_S + 1, float("nan")):
            with pytest.raises(BadRequest):
                await call(channel.unary_unary(UNARY), b"", timeout_s=timeout_s)


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_call_without_the_token_is_refused(token: str) -> None:
    """A service with a token answers nobody else."""
    async with serving(_raising(AssertionError("reached")), token="right") as host:
        assert type(await _failure(host.address, token=token)) is BadToken


async def test_call_with_the_token_reaches_the_handler() -> None:
    """The channel sends the token with each call."""
    async with serving(_raising(UnknownModel("none")), token="right") as host:
        assert type(await _failure(host.address, token="right")) is UnknownModel


@pytest.mark.parametrize("platform", ["", "right"])
async def test_where_tenants_come_in_a_token_of_nobody_is_refused(platform: str) -> None:
    """Also where the platform asks for none: a mistyped key must not get its rights. Without any, its door is open."""
    keys = {"alice's": "alice"}
    handlers = _raising(UnknownModel("none"))
    async with serving(handlers, tenant_of=lambda key: keys.get(key, ""), token=platform) as host:
        assert type(await _failure(host.address, token="garbage")) is BadToken
        assert type(await _failure(host.address, token="alice's")) is CallerDenied
        assert type(await _failure(host.address, token=platform)) is UnknownModel


async def test_handler_cannot_call_on_past_the_deadline_of_its_caller() -> None:
    """A further call made by a handler gets no more time than its own caller left."""

    async def slow(request: bytes, context: Any) -> bytes:
        return str(context.time_remaining()).encode()

    async def forward(request: bytes, context: Any) -> bytes:
        async with open_channel(request.decode()) as channel:
            return bytes(await call(channel.unary_unary(UNARY), b"", timeout_s=3600))

    async with (
        serving({UNARY: grpc.unary_unary_rpc_method_handler(slow)}) as inner,
        serving({UNARY: grpc.unary_unary_rpc_method_handler(forward)}) as outer,
        open_channel(outer.address) as channel,
    ):
        reply = await call(channel.unary_unary(UNARY), inner.address.encode(), timeout_s=30)
    # The protocol rounds a timeout of half a minute up to whole seconds.
    assert 0 < float(reply) <= 31


async def test_expired_deadline_is_a_timeout() -> None:
    """The caller gets DEADLINE_EXCEEDED as our Timeout."""

    async def never(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with (
        serving({UNARY: grpc.unary_unary_rpc_method_handler(never)}) as host,
        open_channel(host.address) as channel,
    ):
        with pytest.raises(Timeout):
            await call(channel.unary_unary(UNARY), b"", timeout_s=0.2)


def test_status_lost_on_the_way_can_be_retried() -> None:
    """A write that fails as the service ends the call hides its status: that is no mistake of ours."""
    metadata = grpc.aio.Metadata()
    lost = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details="Internal error from Core")
    assert type(from_rpc_error(lost)) is ServiceUnavailable
