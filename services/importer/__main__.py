"""Runs the importer service: `python -m services.importer`."""

from __future__ import annotations

import asyncio

from smelt.importer.v1 import importer_pb2_grpc

from services.importer.config import ImporterConfig
from services.importer.servicer import ImporterServicer
from services.importer.verbs import Importer
from services.importer.worker import Handlers, Tools
from smeltkit import telemetry
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.jobs.worker import Worker
from smeltkit.probing import InferenceProber
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.workspaces import Workspaces


async def serve() -> None:
    """Serves and works until SIGTERM."""
    config = from_environment(ImporterConfig, "SMELT_IMPORTER_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    store = S3Store(platform)
    await asyncio.to_thread(store.prove)
    bus = await Bus.connect(platform, name="importer")
    try:

        async def exists(digest: str) -> bool:
            return await asyncio.to_thread(store.has_manifest, digest)

        workspaces = Workspaces(config.cache_dir / "work")
        await asyncio.to_thread(workspaces.reap)
        tools = Tools(
            config=config,
            store=store,
            cache=NodeCache(config.cache_dir / "bundles", store, config.cache_bytes),
            workspaces=workspaces,
            stages=StageCache(bus, exists),
            catalog=Catalog(bus),
            bus=bus,
            prober=InferenceProber(
                config.inference_address,
                token=rpc.secret(),
                identity=rpc.identity(),
                start_s=platform.inference_start_s,
            ),
        )
        ledger = JobLedger(bus)
        host = ServiceHost("importer", rpc)
        host.add(
            "smelt.importer.v1.ImporterService",
            importer_pb2_grpc.add_ImporterServiceServicer_to_server,
            ImporterServicer(Importer(tools, ledger)),
        )
        worker = Worker(bus, ledger, "importer", Handlers(tools).by_kind(), slots=config.slots)
        host.set_ready(True)
        await host.run(worker.run, Sweeper(ledger).run)
    finally:
        await bus.close()


def main() -> None:
    """Wires telemetry around the service."""
    shutdown = telemetry.setup("importer")
    try:
        asyncio.run(serve())
    finally:
        shutdown()


if __name__ == "__main__":
    main()
