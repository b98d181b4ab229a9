"""Runs the gateway: `python -m gateway`. The gRPC edge and the HTTP edge share one process and one event loop."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from functools import partial

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.artifact.v1 import artifact_pb2_grpc
from smelt.job.v1 import job_pb2_grpc
from smelt.tenant.v1 import tenant_pb2_grpc

from gateway.artifact_servicer import ArtifactServicer
from gateway.config import GatewayConfig
from gateway.forwarding import FORWARDED, ForwardedHealth, Forwarder
from gateway.http.app import build_app, build_metrics_app
from gateway.http.config import HttpConfig
from gateway.http.metrics import Metrics
from gateway.http_server import serve_http
from gateway.tenants.accounts import Accounts
from gateway.tenants.admission import Admission
from gateway.tenants.keys import ApiKeys
from gateway.tenants.metering import Metering
from gateway.tenants.servicer import TenantServicer
from smeltkit import limits
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus.client import Bus
from smeltkit.bus.subjects import TENANTS_BUCKET
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.servicer import JobServicer
from smeltkit.jobs.sweeper import run_sweeper
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service

_LOG = logging.getLogger(__name__)


async def serve() -> None:
    """Serves until SIGTERM."""
    config = from_environment(GatewayConfig, "SMELT_GATEWAY_")
    http_config = from_environment(HttpConfig, "SMELT_HTTP_")
    platform = from_environment(PlatformConfig, "SMELT_PLATFORM_")
    rpc = from_environment(RpcConfig, "SMELT_RPC_")
    identity = rpc.identity()
    async with AsyncExitStack() as stack:
        channels = {
            name: await stack.enter_async_context(
                open_channel(address, token=rpc.secret(), identity=identity, peer=name, is_retrying=False)
            )
            for name, address in config.addresses.items()
            if name != "inference"
        }
        channels["inference"] = await stack.enter_async_context(
            open_inference(
                config.inference_address,
                token=rpc.secret(),
                identity=identity,
                start_s=platform.inference_start_s,
                is_for_operator=True,
            )
        )
        bus = await Bus.connect(platform, name="gateway")
        stack.push_async_callback(bus.close)
        catalog, ledger, store = Catalog(bus), JobLedger(bus), S3Store(platform)
        await asyncio.to_thread(store.prove)

        if http_config.api_keys_file and not rpc.is_guarded:
            _LOG.warning(
                "there are API keys, but who calls the gRPC edge without one has all rights; set SMELT_RPC_TOKEN"
            )
        keys, accounts = ApiKeys.from_file(http_config.api_keys_file), Accounts(bus.bucket(TENANTS_BUCKET))
        admission = Admission(keys=keys, accounts=accounts, ledger=ledger, catalog=catalog)
        host = ServiceHost("gateway", rpc, health_servicer=ForwardedHealth(channels), tenant_of=keys.holder_at_grpc)
        host.add(
            "smelt.artifact.v1.ArtifactService",
            artifact_pb2_grpc.add_ArtifactServiceServicer_to_server,
            ArtifactServicer(catalog, store, admission),
        )
        host.add("smelt.job.v1.JobService", job_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(ledger))
        add_tenants = tenant_pb2_grpc.add_TenantServiceServicer_to_server
        host.add("smelt.tenant.v1.TenantService", add_tenants, TenantServicer(keys, accounts))
        host.add_generic(Forwarder(channels, admission), *FORWARDED)

        async def is_bus_connected() -> bool:
            return bus.is_connected

        async def is_inference_serving() -> bool:
            return await _is_serving(channels["inference"])

        checks = {"bus": is_bus_connected, "inference": is_inference_serving}
        counts = Metrics()
        edge = build_app(
            http_config, catalog, channels["inference"], keys=keys, accounts=accounts, checks=checks, counts=counts
        )
        pages = [(edge, config.http_listen)]
        if http_config.metrics_listen:
            pages.append((build_metrics_app(counts), http_config.metrics_listen))
        host.set_ready(True)
        await host.run(
            *(partial(serve_http, app, listen, drain_grace_s=rpc.drain_grace_s) for app, listen in pages),
            partial(run_sweeper, ledger),
            partial(accounts.run, keys.tenant),
            Metering(keys, accounts, ledger, store).run,
        )


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    check = health_pb2_grpc.HealthStub(channel).Check
    reply = await check(health_pb2.HealthCheckRequest(), timeout=limits.HTTP_READY_TIMEOUT_S)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    run_service("gateway", serve)
