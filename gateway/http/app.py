"""The HTTP edge put together: one ASGI application for any server; `gateway.http_server` runs it on uvicorn.

app = build_app(HttpConfig(), catalog, channel_to_inference, checks={"bus": ..., "inference": ...})
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import grpc
from smelt.inference.v1 import inference_pb2_grpc
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gateway.http import metrics
from gateway.http.config import HttpConfig
from gateway.http.edge import Edge
from gateway.http.generation import Generation, Resolver, unknown_model
from gateway.http.replies import Health, ModelInfo, ModelList
from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import ApiKeys, Tenant
from smeltkit import limits
from smeltkit.catalog import Entry
from smeltkit.manifest import BUNDLE_TYPE

_LOG = logging.getLogger(__name__)
Check = Callable[[], Awaitable[bool]]


class ModelNames(Resolver, Protocol):
    """What the edge needs of the catalogue; `smeltkit.catalog.Catalog` is one."""

    async def get(self, name: str) -> Entry | None:
        """The entry of a name, or None."""

    async def list(self, artifact_type: str = "") -> list[Entry]:
        """Entries of one type."""


def build_app(
    config: HttpConfig,
    catalog: ModelNames,
    inference: grpc.aio.Channel,
    *,
    keys: ApiKeys,
    accounts: Accounts,
    checks: Mapping[str, Check],
    counts: metrics.Metrics | None = None,
) -> ASGIApp:
    """The application. `inference` is a channel to the inference service, `checks` is what readiness rests on.

    `keys` are let in, and what they used is in `accounts`.

    `counts` are what `build_metrics_app` shows too. The caller closes the channel after the server has stopped.
    """
    if not config.api_keys_file:
        _LOG.warning("the HTTP edge asks for no API key: whoever reaches it may use it (SMELT_HTTP_API_KEYS_FILE)")
    counts = counts or metrics.Metrics()
    generation = Generation(
        catalog=catalog,
        inference=inference_pb2_grpc.InferenceServiceStub(inference),
        config=config,
        metrics=counts,
        accounts=accounts,
    )
    models = _Models(catalog)
    routes = [
        Route("/v1/chat/completions", generation.chat, methods=["POST"]),
        Route("/v1/completions", generation.complete, methods=["POST"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{model:path}", models.get, methods=["GET"]),
        *operations_routes(counts, checks),
    ]
    router = Router(routes, redirect_slashes=False)
    return Edge(router, keys, counts)


def build_metrics_app(counts: metrics.Metrics) -> ASGIApp:
    """Nothing but the page of metrics, for whoever reaches its port: Prometheus has no key."""
    return Router([_metrics_route(counts)], redirect_slashes=False)


def operations_routes(counts: metrics.Metrics, checks: Mapping[str, Check]) -> list[Route]:
    """Health and metrics."""

    async def is_alive(request: Request) -> Response:
        return _json(Health(status="ok"))

    async def is_ready(request: Request) -> Response:
        results = await asyncio.gather(*(_run(check) for check in checks.values()))
        outcome = dict(zip(checks, results, strict=True))
        is_ready = all(results)
        return _json(Health(status="ok" if is_ready else "unavailable", checks=outcome), 200 if is_ready else 503)

    return [
        Route("/healthz", is_alive, methods=["GET"]),
        Route("/v2/health/live", is_alive, methods=["GET"]),
        Route("/v2/health/ready", is_ready, methods=["GET"]),
        _metrics_route(counts),
    ]


def _metrics_route(counts: metrics.Metrics) -> Route:
    async def show_metrics(request: Request) -> Response:
        return Response(counts.render(), media_type=metrics.MEDIA_TYPE)

    return Route("/metrics", show_metrics, methods=["GET"])


class _Models:
    def __init__(self, catalog: ModelNames) -> None:
        self._catalog = catalog

    async def list(self, request: Request) -> Response:
        entries = await self._catalog.list(BUNDLE_TYPE)
        tenant: Tenant = request.state.tenant
        return _json(
            ModelList(object="list", data=[_to_model(entry) for entry in entries if tenant.may_use(entry.name)])
        )

    async def get(self, request: Request) -> Response:
        name = request.path_params["model"]
        request.state.tenant.check_model(name)
        entry = await self._catalog.get(name)
        if entry is None or entry.artifact_type != BUNDLE_TYPE:
            raise unknown_model(name)
        return _json(_to_model(entry))


def _to_model(entry: Entry) -> ModelInfo:
    return ModelInfo(
        id=entry.name.removesuffix(":latest"),
        object="model",
        created=0,
        owned_by="smelt",
        digest=entry.digest,
        size_bytes=entry.size_bytes,
    )


async def _run(check: Check) -> bool:
    """The outcome of `check`; one that fails or takes too long is not ready."""
    try:
        async with asyncio.timeout(limits.HTTP_READY_TIMEOUT_S):
            return await check()
    except Exception:
        return False


def _json(reply: Health | ModelInfo | ModelList, status: int = 200) -> Response:
    return Response(reply.to_json(), status, media_type="application/json")
