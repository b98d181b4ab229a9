"""Calls to the services, passed on as bytes: one address for clients, and no message decoded on the way, except that
the channel to inference reads prompts to choose a replica.

Whether replies are one or many makes no difference on the way; whether requests are decides how they are sent.
Deadline, metadata, trace, cancellation, status and error details go through. The caller's token does not: each hop has
its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import nullcontext
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from smelt.evaluator.v1 import evaluator_pb2
from smelt.importer.v1 import importer_pb2
from smelt.inference.v1 import inference_pb2
from smelt.sandbox.v1 import sandbox_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.tenants.admission import Admission, Outgoing
from smeltkit import limits
from smeltkit.errors import NoReplica, ServiceUnavailable
from smeltkit.rpc.context import TENANT, TENANT_KEY, RpcContext
from smeltkit.rpc.status import has_reason

_HOP = frozenset(
    {"traceparent", "tracestate", "authorization", "user-agent", "content-type", "te", "accept-encoding", TENANT_KEY}
)
_FILES = (importer_pb2, trainer_pb2, inference_pb2, evaluator_pb2, sandbox_pb2)

_NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)

FORWARDED = tuple(service.full_name for file in _FILES for service in file.DESCRIPTOR.services_by_name.values())
"""Full names of the services that are passed on."""


class Forwarder(grpc.GenericRpcHandler):
    """Passes `/smelt.<name>.v1.*` on to the channel of `name`; any other method is not its own.

    The channels must not retry: whoever calls the gateway does, and attempts would multiply. Calls of tenants are held
    to their quotas by `admission`, which reads those that plan or start something.
    """

    def __init__(self, channels: Mapping[str, grpc.aio.Channel], admission: Admission | None = None) -> None:
        self._channels, self._admission = channels, admission

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of one method, or None."""
        method = str(handler_call_details.method)
        name = service_of(method.lstrip("/"))
        channel = self._channels.get(name)
        if channel is None:
            return None
        # One request is sent whole: as a stream it may lose the status of an early answer (grpc/grpc#36066).
        has_requests = _has_request_stream(method)
        outgoing: Any = channel.stream_stream(method) if has_requests else channel.unary_stream(method)

        async def forward(request: Any, context: RpcContext) -> AsyncIterator[bytes]:
            tenant, left_s = TENANT.get(), context.time_remaining()
            named = ((TENANT_KEY, tenant),) if tenant else ()
            metadata = grpc.aio.Metadata(*_passed_on(context.invocation_metadata()), *named)
            admission = self._admission if tenant and not has_requests else None
            passed = Outgoing(channel=channel, method=method, metadata=metadata, timeout_s=left_s)
            call = None
            try:
                async with admission.admitted(tenant, passed, request) if admission else nullcontext():
                    call = outgoing(request, timeout=left_s, metadata=metadata)
                    if initial := _passed_on(await call.initial_metadata()):
                        await context.send_initial_metadata(initial)
                    async for reply in call:
                        yield await admission.told(tenant, method, request, reply) if admission else reply
                    context.set_trailing_metadata(_passed_on(await call.trailing_metadata()))
            except grpc.aio.AioRpcError as error:
                await _abort_alike(error, name, context)
            finally:
                if call is not None:
                    call.cancel()

        build = grpc.stream_stream_rpc_method_handler if has_requests else grpc.unary_stream_rpc_method_handler
        return build(forward)


class ForwardedHealth(health.aio.HealthServicer):  # type: ignore[misc]
    """Health of the gateway, and of each service behind it as that service tells."""

    def __init__(self, channels: Mapping[str, grpc.aio.Channel]) -> None:
        super().__init__()
        self._channels = channels

    async def Check(self, request: health_pb2.HealthCheckRequest, context: RpcContext) -> Any:
        """NOT_SERVING for a service that does not answer."""
        channel = self._channel(request)
        if channel is None:
            return await super().Check(request, context)
        try:
            return await health_pb2_grpc.HealthStub(channel).Check(request, timeout=limits.CONNECT_TIMEOUT_S)
        except (grpc.aio.AioRpcError, NoReplica):
            return _NOT_SERVING

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: RpcContext) -> None:
        """Changes as the service tells them; ends with NOT_SERVING when it goes away, so that the caller asks again."""
        channel = self._channel(request)
        if channel is None:
            await super().Watch(request, context)
            return
        watching = health_pb2_grpc.HealthStub(channel).Watch(request)
        try:
            async for reply in watching:
                await context.write(reply)
        except (grpc.aio.AioRpcError, NoReplica):
            await context.write(_NOT_SERVING)
        finally:
            watching.cancel()

    def _channel(self, request: health_pb2.HealthCheckRequest) -> grpc.aio.Channel | None:
        return self._channels.get(service_of(request.service)) if request.service in FORWARDED else None


def service_of(full_name: str) -> str:
    """`importer` for smelt.importer.v1.ImporterService/Inspect; empty for a name that is not ours."""
    package = full_name.split(".")
    return package[1] if len(package) >= 4 and package[0] == "smelt" else ""


def _has_request_stream(method: str) -> bool:
    """Whether the method takes many requests; assumed of one that this release does not know."""
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return True
    return bool(found.client_streaming)


def _passed_on(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata without what belongs to one connection or is set anew."""
    return tuple((key, value) for key, value in metadata or () if key not in _HOP and not key.startswith("grpc-"))


async def _abort_alike(error: grpc.aio.AioRpcError, name: str, context: RpcContext) -> None:
    """Ends the call with the status, message and details that the service gave."""
    trailing = tuple(error.trailing_metadata() or ())
    if error.code() is grpc.StatusCode.UNAVAILABLE and not has_reason(error):
        raise ServiceUnavailable(f"the {name} service does not answer; `smelt status` shows what runs") from error
    await context.abort(error.code(), error.details() or "", trailing)
