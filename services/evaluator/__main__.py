"""Runs the evaluator service: `python -m services.evaluator`."""

from __future__ import annotations

import asyncio

from smelt.evaluator.v1 import evaluator_pb2_grpc

from services.evaluator.config import EvaluatorConfig
from services.evaluator.data import DataSource
from services.evaluator.inference_client import InferenceClient
from services.evaluator.servicer import EvaluatorServicer
from services.evaluator.suites import suites
from services.evaluator.verbs import Evaluator
from services.evaluator.worker import Handlers, Tools
from smeltkit import telemetry
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.jobs.worker import Worker
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost


async def serve() -> None:
    """Serves and works until SIGTERM; a malformed suite ends it at once (R-014)."""
    config = from_environment(EvaluatorConfig, "SMELT_EVALUATOR_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    suites()
    identity = rpc.identity()
    store = S3Store(platform)
    await asyncio.to_thread(store.prove)
    bus = await Bus.connect(platform, name="evaluator")
    try:

        async def exists(digest: str) -> bool:
            return await asyncio.to_thread(store.has_manifest, digest)

        async with (
            open_inference(
                config.inference_address, token=rpc.secret(), identity=identity, start_s=platform.inference_start_s
            ) as inference,
            open_channel(config.sandbox_address, token=rpc.secret(), identity=identity, peer="sandbox") as sandbox,
        ):
            tools = Tools(
                config=config,
                store=store,
                stages=StageCache(bus, exists),
                catalog=Catalog(bus),
                bus=bus,
                data=DataSource(store, config.data_dir, can_download=config.download),
                inference=InferenceClient(inference),
                sandbox=sandbox,
            )
            ledger = JobLedger(bus)
            host = ServiceHost("evaluator", rpc)
            host.add(
                "smelt.evaluator.v1.EvaluatorService",
                evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server,
                EvaluatorServicer(Evaluator(tools, ledger)),
            )
            worker = Worker(bus, ledger, "evaluator", Handlers(tools).by_kind(), slots=config.slots)
            host.set_ready(True)
            await host.run(worker.run, Sweeper(ledger).run)
    finally:
        await bus.close()


def main() -> None:
    """Wires telemetry around the service."""
    shutdown = telemetry.setup("evaluator")
    try:
        asyncio.run(serve())
    finally:
        shutdown()


if __name__ == "__main__":
    main()
