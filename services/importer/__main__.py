"""Runs the importer service: `python -m services.importer`."""

from __future__ import annotations

from smelt.importer.v1 import importer_pb2_grpc

from services.importer.config import ImporterConfig
from services.importer.servicer import ImporterServicer
from services.importer.verbs import Importer
from services.importer.worker import Handlers, Tools
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.bench import bench_of
from smeltkit.jobs.workshop import open_workshop
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service


async def serve() -> None:
    """Serves and works until SIGTERM."""
    config = from_environment(ImporterConfig, "SMELT_IMPORTER_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    async with open_workshop("importer", platform) as workshop:
        folder, inference = config.cache_dir, config.inference_address
        bench = await bench_of(
            workshop, platform, rpc, inference=inference, folder=folder, cache_bytes=config.cache_bytes
        )
        tools = Tools(**vars(bench), config=config)
        host = ServiceHost("importer", rpc)
        host.add(
            "smelt.importer.v1.ImporterService",
            importer_pb2_grpc.add_ImporterServiceServicer_to_server,
            ImporterServicer(Importer(tools, workshop.ledger)),
        )
        await workshop.run(host, Handlers(tools).by_kind(), slots=config.slots)


if __name__ == "__main__":
    run_service("importer", serve)
