"""What a handler knows about its call."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc

from smeltkit import limits

RpcContext: TypeAlias = grpc.aio.ServicerContext[Any, Any]
"""Context of a handler; servicers annotate with it."""

CALL: ContextVar[RpcContext | None] = ContextVar("smelt_rpc_call", default=None)
"""The call being served in this context, set by the server's interceptor."""

TENANT: ContextVar[str] = ContextVar("smelt_tenant", default="")
"""Tenant for whom the call being served is made or the job at hand runs; empty for the platform itself."""

TENANT_KEY = "smelt-tenant"
"""Metadata by which the gateway names the tenant of a call to the services behind it."""


def time_left_s() -> float | None:
    """Seconds that the call being served has left for calls of its own, less a margin; None where nothing bounds it.

    Work that outlives its call must not inherit this bound: start it with `contextvars.Context().run` or from outside.
    """
    call = CALL.get()
    remaining = call.time_remaining() if call is not None else None
    return None if remaining is None else remaining - limits.DEADLINE_MARGIN_S
