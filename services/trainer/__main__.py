"""Runs the trainer service: `python -m services.trainer`."""

from __future__ import annotations

from smelt.trainer.v1 import trainer_pb2_grpc

from services.trainer.checkpoints.run_folders import RunFolders
from services.trainer.config import TrainerConfig
from services.trainer.costs.paces import Paces
from services.trainer.servicer import TrainerServicer
from services.trainer.verbs import Trainer
from services.trainer.worker import Handlers, Tools
from smeltkit.config import PlatformConfig, environment, from_environment
from smeltkit.gpus.devices import NvidiaSmi
from smeltkit.gpus.ledger import GpuLedger
from smeltkit.jobs.bench import bench_of
from smeltkit.jobs.workshop import open_workshop
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.service import run_service


async def serve() -> None:
    """Serves and works until SIGTERM."""
    config = from_environment(TrainerConfig, "SMELT_TRAINER_")
    platform, rpc = from_environment(PlatformConfig, "SMELT_PLATFORM_"), from_environment(RpcConfig, "SMELT_RPC_")
    async with open_workshop("trainer", platform) as workshop:
        folder, inference = config.cache_dir, config.inference_address
        bench = await bench_of(
            workshop, platform, rpc, inference=inference, folder=folder, cache_bytes=config.cache_bytes
        )
        devices = NvidiaSmi(config.nvidia_smi, visible=environment().get("CUDA_VISIBLE_DEVICES"))
        tools = Tools(
            **vars(bench),
            config=config,
            folders=RunFolders(folder / "runs", workshop.ledger),
            paces=Paces(folder / "paces", config.threads),
            gpus=GpuLedger(
                workshop.bus,
                workshop.ledger,
                devices,
                reserve_bytes=config.gpu_reserve_bytes,
                beside_strangers=config.gpu_beside_strangers,
            ),
        )
        host = ServiceHost("trainer", rpc)
        host.add(
            "smelt.trainer.v1.TrainerService",
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerServicer(Trainer(tools, workshop.ledger)),
        )
        await workshop.run(host, Handlers(tools).by_kind(), tools.folders.run, slots=config.slots)


if __name__ == "__main__":
    run_service("trainer", serve)
