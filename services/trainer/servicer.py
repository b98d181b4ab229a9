"""The trainer's calls: declared in the contract, refused with a typed reason until they are built."""

from __future__ import annotations

from typing import NoReturn

from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from smeltkit.errors import NotBuilt
from smeltkit.rpc.context import RpcContext


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers every call with NOT_BUILT: a caller learns it from the status, not from an empty result."""

    async def PlanTrain(self, request: trainer_pb2.PlanTrainRequest, context: RpcContext) -> NoReturn:
        _refuse("train")

    async def StartTrain(self, request: trainer_pb2.StartTrainRequest, context: RpcContext) -> NoReturn:
        _refuse("train")

    async def PlanMerge(self, request: trainer_pb2.PlanMergeRequest, context: RpcContext) -> NoReturn:
        _refuse("merge")

    async def StartMerge(self, request: trainer_pb2.StartMergeRequest, context: RpcContext) -> NoReturn:
        _refuse("merge")

    async def PlanPrune(self, request: trainer_pb2.PlanPruneRequest, context: RpcContext) -> NoReturn:
        _refuse("prune")

    async def StartPrune(self, request: trainer_pb2.StartPruneRequest, context: RpcContext) -> NoReturn:
        _refuse("prune")

    async def PlanDataset(self, request: trainer_pb2.PlanDatasetRequest, context: RpcContext) -> NoReturn:
        _refuse("dataset")

    async def StartDataset(self, request: trainer_pb2.StartDatasetRequest, context: RpcContext) -> NoReturn:
        _refuse("dataset")


def _refuse(verb: str) -> NoReturn:
    raise NotBuilt(
        f"trainer verb {verb!r} is declared but not built in this release; import, quantize, serve and evaluate are"
    )
