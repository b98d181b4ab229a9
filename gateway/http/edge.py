"""What happens around every request: an id, the key, the trace, one place where errors become answers, the counts."""

from __future__ import annotations

import logging
import re
import time

from opentelemetry.trace import SpanKind
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.errors import to_response
from gateway.http.metrics import Metrics
from gateway.tenants.keys import EVERYBODY, ApiKeys
from smeltkit import telemetry
from smeltkit.errors import InternalError, KeyDenied, SmeltError, UnknownRoute
from smeltkit.ids import new_id
from smeltkit.telemetry import names
from smeltkit.telemetry.spans import mark_failed

_LOG = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499
OPEN_ROUTES = ("/healthz", "/v2/health/live", "/v2/health/ready")
"""Addresses that need no key: probes have none."""
INSIDE_ROUTES = ("/metrics",)
"""Addresses that no tenant gets: they are the platform's own."""


class Edge:
    """Wraps the router."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self
        answer = _Answer(send, request_id)
        start = time.monotonic()
        self._metrics.in_flight += 1
        try:
            with telemetry.attached(headers), telemetry.span(scope["method"], SpanKind.SERVER) as current:
                cause = await self._answer(scope, receive, answer, headers.get("authorization", ""))
                if cause is not None and cause.http_status >= 500:
                    mark_failed(current, cause.reason())
                current.update_name(f"{scope['method']} {_route_of(scope)}")
                current.set_attributes({
                    names.HTTP_METHOD: scope["method"],
                    names.HTTP_ROUTE: _route_of(scope),
                    names.HTTP_STATUS: answer.status,
                })  # fmt: skip
        finally:
            self._metrics.in_flight -= 1
            self._metrics.count_request(_route_of(scope), answer.status, time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, authorization: str) -> SmeltError | None:
        """Answers, and returns the error that the answer is, if it is one."""
        error: SmeltError
        try:
            if scope["path"] not in OPEN_ROUTES:
                scope["state"]["tenant"] = tenant = self._keys.check(authorization)
                if scope["path"] in INSIDE_ROUTES and tenant is not EVERYBODY:
                    raise KeyDenied(
                        f"{scope['path']} tells of all tenants, and no API key opens it; it is served without a key at"
                        " SMELT_HTTP_METRICS_LISTEN, inside the platform"
                    )
            await self._app(scope, receive, answer)
            return None
        except ClientDisconnect:
            return None
        except SmeltError as raised:
            error = raised
        except HTTPException:
            error = UnknownRoute(
                f"{scope['method']} {scope['path'][:200]} is not offered; see the documented addresses"
            )
        except Exception:
            _LOG.exception("request failed", extra={"request_id": answer.request_id})
            error = InternalError(f"the request failed; see the gateway's log for {answer.request_id}")
        if not answer.is_started:
            await to_response(error)(scope, receive, answer)
        return error


class _Answer:
    """Passes messages on, adds the request's id, and remembers what was sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.request_id, self.status, self.is_started = request_id, _CLIENT_LEFT, False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": headers}
        await self._send(message)


def _route_of(scope: Scope) -> str:
    """The template of the route that matched: paths that callers invent must not become labels."""
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "other"
