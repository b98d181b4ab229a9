"""Runs the evaluator service: `python -m services.evaluator`."""

from __future__ import annotations

from smelt.evaluator.v1 import evaluator_pb2_grpc

from services.evaluator.config import EvaluatorConfig
from services.evaluator.data import DataSource
from services.evaluator.inference_client import InferenceClient
from services.evaluator.servicer import EvaluatorServicer
from services.evaluator.suites import suites
from services.evaluator.verbs import Evaluator
from services.evaluator.worker import Handlers, Tools
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.jobs.workshop import open_workshop
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service


async def serve() -> None:
    """Serves and works until SIGTERM; a malformed suite ends it at once (R-014)."""
    config = from_environment(EvaluatorConfig, "SMELT_EVALUATOR_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    suites()
    identity = rpc.identity()
    async with (
        open_workshop("evaluator", platform) as workshop,
        open_inference(
            config.inference_address, token=rpc.secret(), identity=identity, start_s=platform.inference_start_s
        ) as inference,
        open_channel(config.sandbox_address, token=rpc.secret(), identity=identity, peer="sandbox") as sandbox,
    ):
        tools = Tools(
            config=config,
            store=workshop.store,
            stages=workshop.stages,
            catalog=workshop.catalog,
            bus=workshop.bus,
            data=DataSource(workshop.store, config.data_dir, can_download=config.download),
            inference=InferenceClient(inference),
            sandbox=sandbox,
        )
        host = ServiceHost("evaluator", rpc)
        host.add(
            "smelt.evaluator.v1.EvaluatorService",
            evaluator_pb2_grpc.add_EvaluatorServiceServicer_to_server,
            EvaluatorServicer(Evaluator(tools, workshop.ledger)),
        )
        await workshop.run(host, Handlers(tools).by_kind(), slots=config.slots)


if __name__ == "__main__":
    run_service("evaluator", serve)
