"""Spans and their propagation: thin, so that no caller imports OpenTelemetry for the usual things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from smeltkit.errors import SmeltError
from smeltkit.telemetry import names

Attribute = str | int | float | bool
_TRACER = trace.get_tracer("smelt")


@contextmanager
def span(name: str, kind: SpanKind = SpanKind.INTERNAL, /, **attributes: Attribute) -> Iterator[Span]:
    """Runs the block in a span under the current one.

    An exception marks it as failed with its reason (never with its message, which may quote a prompt or a path);
    cancellation is not an error.
    """
    with _TRACER.start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except Exception as error:
            mark_failed(current, error_type(error))
            raise


def event(name: str, /, **attributes: Attribute) -> None:
    """Marks a moment of the current span: for what happens too often for a span of its own. The last 128 are kept."""
    trace.get_current_span().add_event(name, attributes)


def mark_failed(current: Span, cause: str) -> None:
    """Gives a span the status ERROR and the attribute `error.type`; a cause given before stays."""
    current.set_attribute(names.ERROR_TYPE, cause)
    current.set_status(Status(StatusCode.ERROR, cause))


def error_type(error: BaseException) -> str:
    """The reason of one of our errors, else the name of the class."""
    return error.reason() if isinstance(error, SmeltError) else type(error).__name__


def inject() -> dict[str, str]:
    """`traceparent` and `tracestate` of the current context; empty outside of a span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextmanager
def attached(carrier: Mapping[str, str]) -> Iterator[None]:
    """Runs the block under the remote parent in `carrier`; without one the block starts a trace of its own."""
    token = context.attach(propagate.extract(carrier, context=context.Context()))
    try:
        yield
    finally:
        context.detach(token)


def current_trace_id() -> str:
    """The current trace as 32 hex digits, or an empty string outside of a span."""
    current = trace.get_current_span().get_span_context()
    return trace.format_trace_id(current.trace_id) if current.is_valid else ""


def current_span_id() -> str:
    """The current span as 16 hex digits, or an empty string outside of a span."""
    current = trace.get_current_span().get_span_context()
    return trace.format_span_id(current.span_id) if current.is_valid else ""
