"""The span and the duration of one call, with the status that the caller really gets."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from google.protobuf import descriptor_pool
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from smeltkit.telemetry import histogram, names
from smeltkit.telemetry.spans import mark_failed

_TRACER = trace.get_tracer("smelt.rpc")
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_DURATIONS = {SpanKind.SERVER: names.RPC_SERVER_DURATION, SpanKind.CLIENT: names.RPC_CLIENT_DURATION}


class CallRecord:
    """Starts with the call `method` (`/package.Service/Method`) and is ended once, with its status."""

    def __init__(self, method: str, kind: SpanKind) -> None:
        self._method = method.lstrip("/") if _is_declared(method) else "_OTHER"
        self._kind = kind
        self._start = time.monotonic()
        attributes = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: self._method}
        self._span = _TRACER.start_span(self._method, kind=kind, attributes=attributes)

    def as_current(self) -> AbstractContextManager[Span]:
        """Makes the call's span the current one for a block, without ending it."""
        return trace.use_span(self._span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def end(self, code: str, cause: str = "") -> None:
        """Ends span and timing with the gRPC status `code` by name and the reason of the error, if there is one.

        The span of a server fails only by what is the server's fault; that of a client by anything but OK.
        """
        self._span.set_attribute(names.RPC_STATUS, code)
        if code != "OK":
            self._span.set_attribute(names.ERROR_TYPE, cause or code)
            if self._kind is SpanKind.CLIENT or code in _SERVER_FAULTS:
                mark_failed(self._span, cause or code)
        self._span.end()
        attributes = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: self._method, names.RPC_STATUS: code}
        histogram(_DURATIONS[self._kind]).record(time.monotonic() - self._start, attributes)


def _is_declared(method: str) -> bool:
    """Whether a proto declares the method: names that callers invent must not become attributes."""
    try:
        descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return False
    return True
