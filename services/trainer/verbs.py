"""What the trainer does when it is called: plan, start. Starting refuses at once what the plan refuses."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from services.trainer import records, work
from services.trainer.worker import Tools, announce, settings_of, train_key
from smeltkit.errors import BadRequest
from smeltkit.ids import check_digest, check_name
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.plan import Plan


class Trainer:
    """The verbs of the service, as plain calls."""

    def __init__(self, tools: Tools, ledger: JobLedger) -> None:
        self._tools, self._ledger = tools, ledger

    async def plan_train(self, spec: trainer_pb2.TrainSpec) -> Plan:
        """The plan of a training."""
        return (await self._plan(spec))[0]

    async def start_train(self, spec: trainer_pb2.TrainSpec, request_id: str) -> job_pb2.Job:
        """A job that trains the base which the name means now; it has succeeded at once if the result is stored."""
        if spec.name:
            check_name(spec.name)
        found, pinned = await self._plan(spec)
        found.check()
        job = await self._ledger.start(
            service="trainer", kind="train", request=pinned, request_id=request_id, cached_digest=found.cached_digest
        )
        if job.is_cached:
            manifest = await asyncio.to_thread(self._tools.store.get_manifest, job.result_digest)
            await announce(self._tools, manifest, name=pinned.name, job_id=job.id)
        return job

    async def get_run(self, bundle: str) -> event_pb2.TrainingFinished:
        """What the newest training that made a bundle took, beside its forecast; UnknownArtifact if none is known."""
        digest = await self._tools.catalog.resolve(bundle)
        return await asyncio.to_thread(records.read_run, self._tools.store, digest)

    async def _plan(self, spec: trainer_pb2.TrainSpec) -> tuple[Plan, trainer_pb2.TrainSpec]:
        if not spec.base:
            raise BadRequest("a training needs a base: its weights, or with init random its shape and tokenizer")
        settings, tools = settings_of(spec), self._tools
        pinned = trainer_pb2.TrainSpec()
        pinned.CopyFrom(spec)
        pinned.base = await tools.catalog.resolve(spec.base)
        data = tuple(map(check_digest, spec.datasets))
        manifest = await asyncio.to_thread(tools.store.get_manifest, pinned.base)
        cached = await tools.stages.get(train_key(tools.stages, pinned, settings))
        with tools.workspaces.folder() as folder:
            found = await asyncio.to_thread(
                work.plan_training, tools.store, tools.cache, manifest, data, settings, folder,
                tools.paces if cached is None else None,
            )  # fmt: skip
        return replace(found, cached_digest=cached or ""), pinned
