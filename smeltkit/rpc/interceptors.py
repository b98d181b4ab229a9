"""What happens around every call: the server's guard and the client's tracing, the same for all four kinds of call.

Server: token, deadline, errors, telemetry. A handler raises; here the error becomes a status, and the span gets the
status that the caller sees: also for abort, exception, cancellation and deadline. Handlers may be coroutines or async
generators; a generator is closed as soon as its call ends, so its `finally` runs at once.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
from opentelemetry.trace import SpanKind

from smeltkit import limits
from smeltkit.errors import BadToken, DeadlineRequired, InternalError, SmeltError, Unimplemented
from smeltkit.ids import new_id
from smeltkit.rpc.access import check_access, check_tenant
from smeltkit.rpc.context import CALL, TENANT, TENANT_KEY, RpcContext
from smeltkit.rpc.status import to_grpc_status
from smeltkit.rpc.tracing import CallRecord
from smeltkit.secret import Secret
from smeltkit.telemetry import attached, inject

_LOG = logging.getLogger(__name__)
_OPEN_PREFIXES = ("/grpc.health.", "/grpc.reflection.")
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_BUILDERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class ServerGuard(grpc.aio.ServerInterceptor):
    """Guards every call of one service. `calls` are the handlers that still run.

    An empty `token` lets everybody in; with `has_callers` each call comes with a certificate, and the table decides.
    `tenant_of` tells whose API key a token is, "" for nobody's: at the gateway, where tenants come in. A token that is
    nobody's is refused there, also where none is asked for: a mistyped key must not get the rights of the platform.
    Behind the gateway the caller, who has the token of the platform, says for which tenant it calls.
    """

    def __init__(
        self,
        service: str,
        token: Secret,
        *,
        has_callers: bool = False,
        tenant_of: Callable[[str], str] | None = None,
    ) -> None:
        self._service = service
        self._tenant_of = tenant_of
        self._has_callers = has_callers
        self._token = token
        self.calls: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the method, guarded; None for a method that is not served."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def guarded(request: Any, context: RpcContext) -> Any:
            async with self._call(method, context):
                result = behaviour(request, context)
                if not inspect.isasyncgen(result):
                    return await result
                async with aclosing(result) as replies:
                    async for reply in replies:
                        await context.write(reply)

        build = _BUILDERS[bool(handler.request_streaming), bool(handler.response_streaming)]
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        guarded_handler: grpc.RpcMethodHandler[Any, Any] = build(guarded, **codec)
        return guarded_handler

    @asynccontextmanager
    async def _call(self, method: str, context: RpcContext) -> AsyncIterator[None]:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        code, cause, task = "OK", "", asyncio.current_task()
        assert task is not None
        self.calls.add(task)
        CALL.set(context)
        with attached(metadata):
            record = CallRecord(method, SpanKind.SERVER)
            try:
                with record.as_current():
                    TENANT.set(self._admit(method, context, metadata))
                    yield
                code = _code_name(context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                code = _code_at_end(context)
                raise
            except Exception as error:
                if context.cancelled():
                    code = _code_at_end(context)
                    raise
                with record.as_current():
                    typed = error if isinstance(error, SmeltError) else self._hide(error, context)
                code, cause = typed.grpc_status, typed.reason()
                await context.abort_with_status(to_grpc_status(typed))
            finally:
                record.end(code, cause)
                self.calls.discard(task)

    def _admit(self, method: str, context: RpcContext, metadata: Mapping[str, str]) -> str:
        """The tenant for whom the call is made; raises unless it may be."""
        if method.startswith(_OPEN_PREFIXES):
            return ""
        given = metadata.get("authorization", "")
        scheme, _, shown = given.partition(" ")
        has_token = scheme == "Bearer" and bool(self._token) and self._token.accepts(shown)
        tenant = "" if self._tenant_of else metadata.get(TENANT_KEY, "")
        if self._tenant_of and scheme == "Bearer" and not has_token:
            tenant = self._tenant_of(shown)
        if self._tenant_of and given and not has_token and not tenant:
            raise BadToken(
                "the token of the call is neither the platform's nor a tenant's key; correct SMELT_RPC_TOKEN,"
                " or take it out where the platform has none"
            )
        if self._token and not has_token and not (self._tenant_of and tenant):
            raise BadToken("the call has no valid token; caller and service need the same SMELT_RPC_TOKEN")
        if self._tenant_of and tenant:
            check_tenant(tenant, method)
        if self._has_callers:
            names = context.auth_context().get("x509_subject_alternative_name", ())
            check_access((name.decode(errors="replace") for name in names), self._service, method)
        if context.time_remaining() is None and not method.rpartition("/")[2].startswith("Watch"):
            raise DeadlineRequired(f"{method} came without a deadline; every call but Watch* and health needs one")
        return tenant

    def _hide(self, error: Exception, context: RpcContext) -> SmeltError:
        if isinstance(error, NotImplementedError) and _code_name(context) == "UNIMPLEMENTED":
            return Unimplemented(f"{self._service} declares this call but does not implement it")
        correlation_id = new_id("err")
        _LOG.error("unexpected exception", exc_info=error, extra={"correlation_id": correlation_id})
        return InternalError(
            f"unexpected error in {self._service}; its log tells more under {correlation_id}",
            details={"correlation_id": correlation_id, "service": self._service},
        )


def client_interceptors(token: Secret) -> list[grpc.aio.ClientInterceptor]:
    """Interceptors for all four kinds of call: trace context and token out, span and duration with the true status."""
    return [kind(token) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]


class _ClientTracing:
    """Health is asked without end, also of who is not there: it needs no token and leaves no trace."""

    def __init__(self, token: Secret) -> None:
        self._token = token
        self._endings: set[asyncio.Task[None]] = set()

    async def _start(self, continuation: Any, details: Any, request: Any) -> Any:
        method = details.method.decode()
        if method.startswith(_OPEN_PREFIXES):
            return await continuation(details, request)
        record = CallRecord(method, SpanKind.CLIENT)
        with record.as_current():
            added = inject()
        if shown := self._token():
            added["authorization"] = f"Bearer {shown}"
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *added.items())
        try:
            call = await continuation(details._replace(metadata=metadata), request)
        except BaseException:
            record.end("CANCELLED")
            raise
        ending = asyncio.create_task(_end_with_status(record, call))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return call


class _UnaryUnary(_ClientTracing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._start(continuation, client_call_details, request)


class _UnaryStream(_ClientTracing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._start(continuation, client_call_details, request)


class _StreamUnary(_ClientTracing, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._start(continuation, client_call_details, request_iterator)


class _StreamStream(_ClientTracing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._start(continuation, client_call_details, request_iterator)


async def _end_with_status(record: CallRecord, call: Any) -> None:
    code = "CANCELLED"
    try:
        code = (await call.code()).name
    finally:
        record.end(code)


def _code_name(context: RpcContext) -> str:
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _CODE_NAMES[code or 0]


def _code_at_end(context: RpcContext) -> str:
    """Status of a call that ended from outside its handler: aborted, past its deadline, or cancelled by the caller."""
    if (code := _code_name(context)) != "OK":
        return code
    remaining = context.time_remaining()
    return "DEADLINE_EXCEEDED" if remaining is not None and remaining < limits.DEADLINE_MARGIN_S else "CANCELLED"
