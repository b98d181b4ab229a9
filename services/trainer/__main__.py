"""Runs the trainer service: `python -m services.trainer`."""

from __future__ import annotations

import asyncio

from smelt.trainer.v1 import trainer_pb2_grpc

from services.trainer.config import TrainerConfig
from services.trainer.servicer import TrainerServicer
from smeltkit import telemetry
from smeltkit.config import from_environment
from smeltkit.rpc.server import RpcConfig, ServiceHost


async def serve() -> None:
    """Serves until SIGTERM."""
    from_environment(TrainerConfig, "SMELT_TRAINER_")
    host = ServiceHost("trainer", from_environment(RpcConfig, "SMELT_RPC_"))
    host.add(
        "smelt.trainer.v1.TrainerService", trainer_pb2_grpc.add_TrainerServiceServicer_to_server, TrainerServicer()
    )
    host.set_ready(True)
    await host.run()


def main() -> None:
    """Wires telemetry around the service."""
    shutdown = telemetry.setup("trainer")
    try:
        asyncio.run(serve())
    finally:
        shutdown()


if __name__ == "__main__":
    main()
