"""Real gRPC servers on loopback whose handlers a test gives as functions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc

from smeltkit.rpc.server import RpcConfig, ServiceHost


class Handlers(grpc.GenericRpcHandler):
    """Method handlers by full method name, e.g. /smelt.job.v1.JobService/GetJob."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of one method, or None."""
        return self._handlers.get(str(handler_call_details.method))


@asynccontextmanager
async def serving(
    handlers: Mapping[str, Any], *, tenant_of: Callable[[str], str] | None = None, **settings: Any
) -> AsyncIterator[ServiceHost]:
    """A started, ready host with these handlers; `settings` are those of RpcConfig."""
    host = ServiceHost("tested", RpcConfig(**settings), tenant_of=tenant_of)
    host.add_generic(Handlers(handlers))
    host.set_ready(True)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()
