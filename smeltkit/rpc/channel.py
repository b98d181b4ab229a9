"""Channels and calls to a service: deadlines always, errors as their own classes, streams cancelled by who opened them.

Retries are safe for every Smelt method: reads, writes by digest, compare-and-swap, or starts with a client-made request
id. Only UNAVAILABLE is retried, and never once a reply has begun.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from smeltkit import limits
from smeltkit.errors import BadRequest, Timeout
from smeltkit.rpc.context import time_left_s
from smeltkit.rpc.interceptors import client_interceptors
from smeltkit.rpc.status import from_rpc_error
from smeltkit.rpc.tls import Identity
from smeltkit.secret import Secret

MESSAGE_SIZE_OPTIONS = (
    ("grpc.max_send_message_length", limits.MESSAGE_MAX_BYTES),
    ("grpc.max_receive_message_length", limits.MESSAGE_MAX_BYTES),
)


def open_channel(
    address: str,
    *,
    token: Secret | str = "",
    identity: Identity | None = None,
    peer: str = "",
    is_retrying: bool = True,
) -> grpc.aio.Channel:
    """A channel to `address` (host:port, or dns:///name:port to spread calls over replicas); close it after use.

    `token` is sent as a bearer token with each call. With an `identity` calls are encrypted, and whoever answers must
    prove to be the service `peer`. `is_retrying` False is for whoever only passes calls on.
    """
    secret = Secret(token) if isinstance(token, str) else token
    options = [
        *MESSAGE_SIZE_OPTIONS,
        ("grpc.enable_http_proxy", 0),
        ("grpc.keepalive_time_ms", int(limits.KEEPALIVE_TIME_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", int(limits.RECONNECT_FIRST_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(limits.RECONNECT_MAX_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.service_config", _service_config(is_retrying)),
    ]
    if identity is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=client_interceptors(secret))
    options.append(("grpc.ssl_target_name_override", peer))
    return identity.channel(
        lambda credentials: grpc.aio.secure_channel(
            address, credentials, options=options, interceptors=client_interceptors(secret)
        )
    )


async def call(method: Any, request: Any, *, timeout_s: float) -> Any:
    """The reply of a unary call (or of one with a request stream: then `request` is an async iterable).

    A failure raises the SmeltError that it carries. Within a served call the time that call has left also bounds it.
    """
    try:
        return await method(request, timeout=_bounded(timeout_s))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, _name(method)) from error


@asynccontextmanager
async def stream(method: Any, request: Any, *, timeout_s: float) -> AsyncIterator[AsyncIterator[Any]]:
    """The replies of a streaming call, cancelled when the block is left in whatever way; errors as with `call`."""
    running = method(request, timeout=_bounded(timeout_s))
    try:
        yield _replies(running, _name(method))
    finally:
        running.cancel()


async def _replies(running: Any, name: str) -> AsyncIterator[Any]:
    try:
        async for reply in running:
            yield reply
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, name) from error


def _bounded(timeout_s: float) -> float:
    if not 0 < timeout_s <= limits.CALL_TIMEOUT_MAX_S:
        raise BadRequest(f"timeout_s={timeout_s} must be above 0 and at most {limits.CALL_TIMEOUT_MAX_S:.0f}")
    left_s = time_left_s()
    if left_s is not None and left_s <= 0:
        raise Timeout("the caller's deadline leaves no time for a further call")
    return timeout_s if left_s is None else min(timeout_s, left_s)


def _name(method: Any) -> str:
    name = getattr(method, "_method", b"")
    return name.decode().lstrip("/") if isinstance(name, bytes) else ""


def _service_config(is_retrying: bool) -> str:
    method: dict[str, Any] = {"name": [{}]}
    if is_retrying:
        method["retryPolicy"] = {
            "maxAttempts": limits.CALL_ATTEMPTS_MAX,
            "initialBackoff": "0.1s",
            "maxBackoff": "1s",
            "backoffMultiplier": 3,
            # A server that stops answers a call that crosses with its goodbye by CANCELLED; our own cancel ends a call.
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
    return json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]})
