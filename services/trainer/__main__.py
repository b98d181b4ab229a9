"""Runs the trainer service: `python -m services.trainer`."""

from __future__ import annotations

import asyncio

from smelt.trainer.v1 import trainer_pb2_grpc

from services.trainer.config import TrainerConfig
from services.trainer.paces import Paces
from services.trainer.run_folders import RunFolders
from services.trainer.servicer import TrainerServicer
from services.trainer.verbs import Trainer
from services.trainer.worker import Handlers, Tools
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
    config = from_environment(TrainerConfig, "SMELT_TRAINER_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    store = S3Store(platform)
    await asyncio.to_thread(store.prove)
    bus = await Bus.connect(platform, name="trainer")
    try:

        async def exists(digest: str) -> bool:
            return await asyncio.to_thread(store.has_manifest, digest)

        workspaces = Workspaces(config.cache_dir / "work")
        await asyncio.to_thread(workspaces.reap)
        ledger = JobLedger(bus)
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
            folders=RunFolders(config.cache_dir / "runs", ledger),
            paces=Paces(config.cache_dir / "paces", config.threads),
        )
        host = ServiceHost("trainer", rpc)
        host.add(
            "smelt.trainer.v1.TrainerService",
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerServicer(Trainer(tools, ledger)),
        )
        worker = Worker(bus, ledger, "trainer", Handlers(tools).by_kind(), slots=config.slots)
        host.set_ready(True)
        await host.run(worker.run, Sweeper(ledger).run, tools.folders.run)
    finally:
        await bus.close()


def main() -> None:
    """Wires telemetry around the service."""
    shutdown = telemetry.setup("trainer")
    try:
        asyncio.run(serve())
    finally:
        shutdown()


if __name__ == "__main__":
    main()
