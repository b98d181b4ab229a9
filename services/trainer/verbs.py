"""What the trainer does when it is called: plan, start. Starting refuses at once what the plan refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from services.trainer import together, work
from services.trainer.admission import Admission, admit
from services.trainer.costs.paces import Paces
from services.trainer.settings.training import TrainSettings
from services.trainer.tracking import exports, records
from services.trainer.worker import (
    TOGETHER,
    Tools,
    announce,
    begun,
    noise_key,
    parts_of,
    settings_of,
    title_of,
    train_key,
)
from smeltkit.errors import BadConfig, BadRequest, SmeltError
from smeltkit.gpus.ledger import Standing
from smeltkit.ids import check_digest, check_name
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.plan import Plan
from smeltkit.manifest import Manifest


class Trainer:
    """The verbs of the service, as plain calls."""

    def __init__(self, tools: Tools, ledger: JobLedger) -> None:
        self._tools, self._ledger = tools, ledger

    async def plan_train(self, spec: trainer_pb2.TrainSpec, further: Sequence[trainer_pb2.TrainSpec]) -> Plan:
        """The plan of a training, or of a joint one if `further` adapters are trained with it."""
        return (await self._plan_together([spec, *further]) if further else await self._plan(spec))[0]

    async def start_train(
        self, spec: trainer_pb2.TrainSpec, further: Sequence[trainer_pb2.TrainSpec], request_id: str
    ) -> job_pb2.Job:
        """A job that trains the base which the name means now; it has succeeded at once if the result is stored.

        With `further` adapters it is one that trains all of them on one base in memory.
        """
        for one in (spec, *further):
            if one.name:
                check_name(one.name)
        if further:
            plan, joint = await self._plan_together([spec, *further])
            plan.check()
            return await self._ledger.start(service="trainer", kind=TOGETHER, request=joint, request_id=request_id)
        found, pinned = await self._plan(spec)
        found.check()
        job = await self._ledger.start(
            service="trainer", kind="train", request=pinned, request_id=request_id, cached_digest=found.cached_digest
        )
        if job.is_cached:
            manifest = await asyncio.to_thread(self._tools.store.get_manifest, job.result_digest)
            await announce(self._tools, manifest, name=pinned.name, job_id=job.id)
        return job

    async def list_runs(self, limit: int) -> list[Manifest]:
        """Records of trainings, newest first."""
        return await asyncio.to_thread(records.list_runs, self._tools.store, limit)

    async def list_gpus(self) -> Standing:
        """The GPUs of this machine, and who holds which."""
        return await self._tools.gpus.standing()

    async def get_run(self, bundle: str) -> event_pb2.TrainingFinished:
        """What the newest training that made a bundle took, beside its forecast; UnknownArtifact if none is known."""
        digest = await self._tools.catalog.resolve(bundle)
        return await asyncio.to_thread(records.read_run, self._tools.store, digest)

    async def _plan_together(self, specs: Sequence[trainer_pb2.TrainSpec]) -> tuple[Plan, trainer_pb2.TrainTogether]:
        tools, pinned = self._tools, [await self._pinned(spec) for spec in specs]
        parts = parts_of(pinned)
        manifest = await asyncio.to_thread(tools.store.get_manifest, pinned[0].base)
        admission = await self._admit(manifest, [part.settings for part in parts], pinned[0])
        pauses = [await begun(tools, spec, part.settings) for spec, part in zip(pinned, parts, strict=True)]
        with tools.workspaces.folder() as folder:
            inputs = together.inputs_of(tools.store, tools.cache, manifest, parts, folder, pauses)
            found = await asyncio.to_thread(together.plan_parts, parts, inputs, self._paces(admission))
        return _with(found, admission), trainer_pb2.TrainTogether(specs=pinned)

    def _paces(self, admission: Admission) -> Paces | None:
        """What a training as it would run now was seen to take; None where it could not begin now."""
        return self._tools.paces.seeing(admission.environment) if admission.is_free else None

    async def _admit(
        self, manifest: Manifest, settings: Sequence[TrainSettings], spec: trainer_pb2.TrainSpec
    ) -> Admission:
        tools = self._tools
        config = await asyncio.to_thread(work.config_of, tools.cache, manifest, settings[0])
        found = await admit(tools.gpus, config, settings, spec.gpu, title_of(spec))
        unable: list[SmeltError] = [
            BadConfig(f"nodes={one.nodes}, but trainings here share {tools.config.nodes} machines at most; lower it")
            for one in settings
            if one.nodes > tools.config.nodes
        ]
        unable += [why for one in settings for why in exports.refusals(one.export, tools.config.destinations)]
        return replace(found, refusals=(*found.refusals, *unable))

    async def _pinned(self, spec: trainer_pb2.TrainSpec) -> trainer_pb2.TrainSpec:
        """The training with its base by digest."""
        if not spec.base:
            raise BadRequest("a training needs a base: its weights, or with init random its shape and tokenizer")
        for digest in spec.datasets:
            check_digest(digest)
        pinned = trainer_pb2.TrainSpec()
        pinned.CopyFrom(spec)
        pinned.base = await self._tools.catalog.resolve(spec.base)
        return pinned

    async def _plan(self, spec: trainer_pb2.TrainSpec) -> tuple[Plan, trainer_pb2.TrainSpec]:
        settings, tools = settings_of(spec), self._tools
        pinned = await self._pinned(spec)
        manifest = await asyncio.to_thread(tools.store.get_manifest, pinned.base)
        cached = await tools.stages.get(train_key(tools.stages, pinned, settings))
        admission = Admission(is_free=False) if cached else await self._admit(manifest, [settings], pinned)
        before = None if cached else await begun(tools, pinned, settings)
        measured = await tools.stages.get(noise_key(tools.stages, pinned.base, pinned.datasets[0], settings.method))
        similar = await asyncio.to_thread(tools.store.get_manifest, measured) if measured else None
        with tools.workspaces.folder() as folder:
            inputs = work.Inputs(
                store=tools.store, cache=tools.cache, manifest=manifest, data=tuple(pinned.datasets),
                settings=settings, folder=folder, begun=before, names=tuple(pinned.dataset_names),
            )  # fmt: skip
            found = await asyncio.to_thread(work.plan_training, inputs, self._paces(admission), similar)
        return replace(_with(found, admission), cached_digest=cached or ""), pinned


def _with(plan: Plan, admission: Admission) -> Plan:
    return replace(plan, items={**plan.items, **admission.items}, refusals=(*plan.refusals, *admission.refusals))
