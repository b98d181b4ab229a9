"""Runs the importer service: `python -m services.importer`."""

from __future__ import annotations

import asyncio

from smelt.importer.v1 import importer_pb2_grpc

from services.importer.config import ImporterConfig
from services.importer.servicer import ImporterServicer
from services.importer.verbs import Importer
from services.importer.worker import Handlers, Tools
from smeltkit.blobs.cache import NodeCache
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.workshop import open_workshop
from smeltkit.probing import InferenceProber
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service
from smeltkit.workspaces import Workspaces


async def serve() -> None:
    """Serves and works until SIGTERM."""
    config = from_environment(ImporterConfig, "SMELT_IMPORTER_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    async with open_workshop("importer", platform) as workshop:
        workspaces = Workspaces(config.cache_dir / "work")
        await asyncio.to_thread(workspaces.reap)
        tools = Tools(
            config=config,
            store=workshop.store,
            cache=NodeCache(config.cache_dir / "bundles", workshop.store, config.cache_bytes),
            workspaces=workspaces,
            stages=workshop.stages,
            catalog=workshop.catalog,
            bus=workshop.bus,
            prober=InferenceProber(
                config.inference_address,
                token=rpc.secret(),
                identity=rpc.identity(),
                start_s=platform.inference_start_s,
            ),
        )
        host = ServiceHost("importer", rpc)
        host.add(
            "smelt.importer.v1.ImporterService",
            importer_pb2_grpc.add_ImporterServiceServicer_to_server,
            ImporterServicer(Importer(tools, workshop.ledger)),
        )
        await workshop.run(host, Handlers(tools).by_kind(), slots=config.slots)


def main() -> None:
    """Serves, as a process of its own."""
    run_service("importer", serve)


if __name__ == "__main__":
    main()
