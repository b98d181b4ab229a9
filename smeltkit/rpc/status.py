"""SmeltError to and from google.rpc.Status: the reason travels as ErrorInfo, so both ends raise the same class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from smeltkit import limits
from smeltkit.errors import (
    InternalError,
    QuotaUsedUp,
    ServiceUnavailable,
    SmeltError,
    Timeout,
    TooManyRequests,
    Unimplemented,
    all_errors,
)

DOMAIN = "smelt"
DETAILS_KEY = "grpc-status-details-bin"
_BY_NAME = {code.name: code for code in grpc.StatusCode}
_TOLD_CHARS = 500
_STATUS_LOST = "Internal error from Core"
_WITHOUT_REASON: Mapping[str, type[SmeltError]] = {
    "CANCELLED": ServiceUnavailable,
    "DEADLINE_EXCEEDED": Timeout,
    "RESOURCE_EXHAUSTED": TooManyRequests,
    "UNIMPLEMENTED": Unimplemented,
}


def to_grpc_status(error: SmeltError) -> grpc.Status:
    """`error` as what `abort_with_status` takes. Message and details are cut to what fits into HTTP/2 headers."""
    info = error_details_pb2.ErrorInfo(reason=error.reason(), domain=DOMAIN, metadata=_bounded(error.details))
    details = [_pack(info)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if isinstance(error, QuotaUsedUp):
        subject = f"tenant:{error.details.get('tenant', '')}"
        violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=error.message[:_TOLD_CHARS])
        details.append(_pack(error_details_pb2.QuotaFailure(violations=[violation])))
    message = _cut(error.message, limits.ERROR_MESSAGE_MAX_BYTES)
    code = _BY_NAME[error.grpc_status].value[0]
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=message, details=details))
    return status


def from_rpc_error(error: grpc.aio.AioRpcError, method: str = "") -> SmeltError:
    """The SmeltError that a failed call carries; without a reason of ours, the nearest class of its status code."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            found = _from_details(value)
            if found is not None:
                return found
    code, where = error.code().name, method or "the service"
    if code == "INTERNAL" and error.details() == _STATUS_LOST:
        # grpc/grpc#36066: a write that fails because the service has ended the call hides the status it gave.
        return ServiceUnavailable(f"{where} ended the call while requests were being sent, and its status was lost")
    if code == "UNAVAILABLE":
        return ServiceUnavailable(
            f"{where} does not answer ({error.details()}); check that its service runs, then retry"
        )
    kind = _WITHOUT_REASON.get(code) or _family(code)
    return kind(f"{where} answered {code}: {error.details() or 'no details'}")


def is_unreachable(error: SmeltError) -> bool:
    """Whether the call failed because nothing answers there; what answers, if only to refuse, gives its own reason."""
    cause = error.__cause__
    if not isinstance(cause, grpc.aio.AioRpcError) or cause.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return not has_reason(cause)


def has_reason(error: grpc.aio.AioRpcError) -> bool:
    """Whether the failure was given by the service itself, and not met on the way to it."""
    return DETAILS_KEY in dict(error.trailing_metadata() or ())


def _from_details(data: bytes) -> SmeltError | None:
    status = status_pb2.Status.FromString(data)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    has_info = any(detail.Unpack(info) for detail in status.details if detail.Is(info.DESCRIPTOR))
    has_retry = any(detail.Unpack(retry) for detail in status.details if detail.Is(retry.DESCRIPTOR))
    if not has_info or info.domain != DOMAIN:
        return None
    code = next(code.name for code in grpc.StatusCode if code.value[0] == status.code)
    kind = all_errors().get(info.reason) or _family(code)
    delay_s = retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None
    return kind(status.message, details=dict(info.metadata), retry_after_s=delay_s)


def _family(code: str) -> type[SmeltError]:
    families = (cls for cls in SmeltError.__subclasses__() if cls.grpc_status == code)
    return next(families, InternalError)


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _bounded(details: Mapping[str, str]) -> dict[str, str]:
    left, kept = limits.ERROR_DETAILS_MAX_BYTES, {}
    for key, value in details.items():
        kept[key] = _cut(value, left)
        left -= len(key) + len(kept[key].encode())
        if left <= 0:
            break
    return kept


def _cut(text: str, size_bytes: int) -> str:
    data = text.encode()
    return text if len(data) <= size_bytes else data[: max(0, size_bytes - 3)].decode(errors="ignore") + "..."
