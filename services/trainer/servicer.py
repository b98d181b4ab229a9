"""Calls to verbs and back; what is declared in the contract but not built is refused with a typed reason."""

from __future__ import annotations

from typing import NoReturn

from smelt.trainer.v1 import trainer_pb2, trainer_pb2_grpc

from services.trainer.admission import to_gpus
from services.trainer.verbs import Trainer
from smeltkit.artifacts import to_artifact
from smeltkit.errors import NotBuilt
from smeltkit.jobs.plan import to_plan
from smeltkit.rpc.context import RpcContext


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Serves the verbs of `trainer`; a call that is not built says so by its status, not by an empty result."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def PlanTrain(
        self, request: trainer_pb2.PlanTrainRequest, context: RpcContext
    ) -> trainer_pb2.PlanTrainResponse:
        """What a training would do."""
        return trainer_pb2.PlanTrainResponse(
            plan=to_plan(await self._trainer.plan_train(request.spec, request.together))
        )

    async def StartTrain(
        self, request: trainer_pb2.StartTrainRequest, context: RpcContext
    ) -> trainer_pb2.StartTrainResponse:
        """Trains a bundle, or several adapters on one base."""
        job = await self._trainer.start_train(request.spec, request.together, request.request_id)
        return trainer_pb2.StartTrainResponse(job=job)

    async def GetRun(self, request: trainer_pb2.GetRunRequest, context: RpcContext) -> trainer_pb2.GetRunResponse:
        """The record of the training that made a bundle."""
        return trainer_pb2.GetRunResponse(run=await self._trainer.get_run(request.bundle))

    async def ListRuns(self, request: trainer_pb2.ListRunsRequest, context: RpcContext) -> trainer_pb2.ListRunsResponse:
        """Records of trainings."""
        runs = await self._trainer.list_runs(request.limit)
        return trainer_pb2.ListRunsResponse(runs=map(to_artifact, runs))

    async def ListGpus(self, request: trainer_pb2.ListGpusRequest, context: RpcContext) -> trainer_pb2.ListGpusResponse:
        """GPUs and their leases."""
        return to_gpus(await self._trainer.list_gpus())

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
    raise NotBuilt(f"trainer verb {verb!r} is declared but not built in this release; training is")
