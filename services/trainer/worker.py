"""Jobs to domain: train. A name is given to a bundle only after it generated.

A run's folder belongs to its job, not to an attempt: whoever takes the job over on this machine goes on from its last
checkpoint; on another machine it starts again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from smelt.event.v1 import event_pb2
from smelt.trainer.v1 import trainer_pb2

from services.trainer import together, work
from services.trainer.admission import kind_of, want_of
from services.trainer.checkpoints.run_folders import RunFolders
from services.trainer.config import TrainerConfig
from services.trainer.costs.paces import Paces
from services.trainer.settings.training import TrainSettings, parse_settings
from services.trainer.together import Part
from services.trainer.tracking import records
from services.trainer.tracking.events import StepEvents
from services.trainer.work import Inputs
from smeltkit import probing
from smeltkit.errors import BadRequest, SmeltError
from smeltkit.gpus.ledger import GpuLedger, Lease
from smeltkit.jobs import threads
from smeltkit.jobs.bench import Bench
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.threads import Reporter
from smeltkit.jobs.worker import Handler, JobContext
from smeltkit.locks import file_lock
from smeltkit.manifest import BUNDLE_TYPE, PAUSED_TYPE, Manifest
from smeltkit.telemetry import span

TOGETHER: Final = "train-together"
"""Kind of a job that trains several adapters on one base in memory."""
METHODS: Mapping[int, str] = {
    trainer_pb2.METHOD_PRETRAIN: "pretrain",
    trainer_pb2.METHOD_FULL: "full",
    trainer_pb2.METHOD_LORA: "lora",
    trainer_pb2.METHOD_QLORA: "qlora",
    trainer_pb2.METHOD_IA3: "ia3",
}
"""Method of the contract to the settings' word; others are not built yet."""


@dataclass(frozen=True, kw_only=True)
class Tools(Bench):
    """What the trainer works with."""

    config: TrainerConfig
    folders: RunFolders
    paces: Paces
    gpus: GpuLedger


class Handlers:
    """The kinds of jobs of the trainer."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def by_kind(self) -> Mapping[str, Handler]:
        """Kind of job to what does it."""
        return {"train": self.train, TOGETHER: self.train_together}

    async def train(self, context: JobContext) -> str:
        """Trains what a TrainSpec names, proves that the result generates, names it; its digest."""
        spec = trainer_pb2.TrainSpec.FromString(context.request)
        tools, settings = self._tools, settings_of(spec)
        key = train_key(tools.stages, spec, settings)
        digest = await tools.stages.get(key)
        folder = tools.folders.of(context.job_id)
        if digest is None:
            manifest = await threads.run(context, tools.store.get_manifest, spec.base)
            folder.mkdir(parents=True, exist_ok=True)
            reporter = Reporter(context)
            inputs = Inputs(
                store=tools.store, cache=tools.cache, manifest=manifest, data=tuple(spec.datasets), settings=settings,
                folder=folder, begun=await begun(tools, spec, settings), names=tuple(spec.dataset_names),
            )  # fmt: skip
            with file_lock(tools.folders.lock_of(context.job_id)), span("smelt.trainer.train"):
                async with self._on_gpus(context, manifest, [settings], spec) as lease:
                    outcome = await threads.run(
                        context, work.train, inputs, reporter, paces=tools.paces, lease=lease,
                        told=StepEvents(tools.bus, context.job_id), exports=self._exports(context, spec.name),
                        address=tools.config.address,
                    )  # fmt: skip
                made = await threads.run(context, work.store_result, inputs, outcome, reporter)
            digest = made.digest
            await self._keep(context, key, spec, settings, made, outcome, folder)
        await self._name(context, spec.name, digest)
        return digest

    async def train_together(self, context: JobContext) -> str:
        """Trains the adapters that a TrainTogether names, each as `train` would; digest of the list of their bundles.

        Those that are stored already are not trained again. Where one fails the others are finished, stored and named
        before its error ends the job.
        """
        specs = trainer_pb2.TrainTogether.FromString(context.request).specs
        tools, parts = self._tools, parts_of(specs)
        keys = [train_key(tools.stages, spec, part.settings) for spec, part in zip(specs, parts, strict=True)]
        digests = [await tools.stages.get(key) for key in keys]
        missing = [number for number, digest in enumerate(digests) if digest is None]
        errors: list[SmeltError] = []
        if missing:
            folder = tools.folders.of(context.job_id)
            manifest = await threads.run(context, tools.store.get_manifest, specs[0].base)
            folder.mkdir(parents=True, exist_ok=True)
            wanted = [parts[number] for number in missing]
            pauses = [await begun(tools, specs[number], parts[number].settings) for number in missing]
            inputs = together.inputs_of(tools.store, tools.cache, manifest, wanted, folder, pauses)
            reporter = Reporter(context)
            with file_lock(tools.folders.lock_of(context.job_id)), span("smelt.trainer.train"):
                async with self._on_gpus(context, manifest, [part.settings for part in wanted], specs[0]) as lease:
                    outcome = await threads.run(
                        context, together.train_parts, wanted, inputs, folder, reporter, paces=tools.paces,
                        told=StepEvents(tools.bus, context.job_id), lease=lease, exports=self._exports(context),
                    )  # fmt: skip
                found = await threads.run(context, together.store_parts, wanted, inputs, outcome, reporter)
            for number, made in zip(missing, found, strict=True):
                if isinstance(made, SmeltError):
                    errors.append(made)
                    continue
                digests[number] = made.manifest.digest
                await self._keep(
                    context, keys[number], specs[number], parts[number].settings, made.manifest, made.outcome,
                    made.folder,
                )  # fmt: skip
        stored = [(part, digest) for part, digest in zip(parts, digests, strict=True) if digest is not None]
        for part, digest in stored:
            await self._name(context, part.name, digest)
        for error in errors:
            raise error
        listed = together.together_manifest(parts, [digest for _, digest in stored])
        return await threads.run(context, tools.store.put_manifest, listed)

    @asynccontextmanager
    async def _on_gpus(
        self, context: JobContext, manifest: Manifest, settings: Sequence[TrainSettings], spec: trainer_pb2.TrainSpec
    ) -> AsyncIterator[Lease]:
        """The GPUs of a training on a stored base; what it took of them is remembered for the next one of its kind."""
        gpus = self._tools.gpus
        config = await threads.run(context, work.config_of, self._tools.cache, manifest, settings[0])
        want = await want_of(gpus, config, settings, spec.gpu, title_of(spec))
        async with gpus.held(context, want) as lease:
            yield lease
        if lease.peak_bytes:
            await gpus.learn(kind_of(config, settings), lease.peak_bytes)

    def _exports(self, context: JobContext, name: str = "") -> dict[str, Any]:
        return {"job_id": context.job_id, "name": name, "destinations": self._tools.config.destinations}

    async def _keep(
        self, context: JobContext, key: str, spec: trainer_pb2.TrainSpec, settings: TrainSettings, made: Manifest,
        outcome: Mapping[str, Any], folder: Path,
    ) -> None:  # fmt: skip
        """Remembers what a run stored under `key`: its bundle once that is proven, or where it paused."""
        if made.artifact_type == PAUSED_TYPE:
            await self._remember_pause(context, key, spec, settings, made, outcome)
        else:
            await self._prove(context, key, spec.name, made, outcome, folder)

    async def _prove(
        self, context: JobContext, key: str, name: str, made: Manifest, outcome: Mapping[str, Any], folder: Path
    ) -> None:
        """Proves that a stored result generates, then records its run and remembers it under `key`."""
        tools = self._tools
        await context.progress("probe", 0, 1)
        with span("smelt.trainer.probe"):
            await probing.prove(tools.prober, tools.store, made.digest)
        await context.check_alive()
        finished = await threads.run(
            context, records.store_run, tools.store, folder, context.job_id, name, made, outcome
        )
        await tools.bus.publish_event("trainer.training.finished", finished)
        run = (await threads.run(context, tools.store.get_manifest, finished.run_digest)).config
        if run["noise_scale"]:
            key_of_noise = noise_key(tools.stages, run["base"], run["data"][0], run["settings"]["method"])
            await tools.stages.put(key_of_noise, finished.run_digest)
        if "codes" not in outcome:  # what two revisions did together is no result of either
            await tools.stages.put(key, made.digest)

    async def _remember_pause(
        self, context: JobContext, key: str, spec: trainer_pb2.TrainSpec, settings: TrainSettings, made: Manifest,
        outcome: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Remembers a stored pause under `key`, and as the one to go on from unless a later one is known."""
        tools = self._tools
        await context.check_alive()
        if "codes" in outcome:
            return
        newest = await newest_pause(tools, spec, settings)
        if newest is None or newest.config["step"] < made.config["step"]:
            await tools.stages.put(paused_key(tools.stages, spec, settings), made.digest)
        await tools.stages.put(key, made.digest)

    async def _name(self, context: JobContext, name: str, digest: str) -> None:
        await context.check_alive()
        stored = await threads.run(context, self._tools.store.get_manifest, digest)
        await announce(self._tools, stored, name=name, job_id=context.job_id)


def settings_of(spec: trainer_pb2.TrainSpec) -> TrainSettings:
    """The settings of a request, checked; BadConfig, or BadRequest where the method is said twice and differently."""
    settings = parse_settings(spec.settings_json)
    if METHODS.get(spec.method, "") != settings.method:
        asked = trainer_pb2.Method.Name(spec.method)
        built = ", ".join(METHODS.values())
        raise BadRequest(f"the request says {asked}, its settings method={settings.method}; built are {built}")
    if len(spec.datasets) - settings.files not in (0, 1):
        raise BadRequest(
            f"{len(spec.datasets)} data sets are named; give the {settings.files} of training, stage by stage, then"
            " held-out data if any"
        )
    if len(spec.dataset_names) not in (0, len(spec.datasets)):
        raise BadRequest(f"{len(spec.dataset_names)} names for {len(spec.datasets)} data sets; give none, or one each")
    for name in spec.dataset_names:
        if not name or "/" in name or not name.isprintable():
            raise BadRequest(f"dataset_names: {name!r} must be the name of a file, without folders")
    return settings


def title_of(spec: trainer_pb2.TrainSpec) -> str:
    """What a training is called where it is one of several."""
    return spec.name or f"training of {spec.base.removeprefix('sha256:')[:12]}"


def parts_of(specs: Sequence[trainer_pb2.TrainSpec]) -> list[Part]:
    """The adapters of a joint training; errors of `settings_of`, and those of `check_together`."""
    parts = [
        Part(name=spec.name, data=tuple(spec.datasets), settings=settings_of(spec), files=tuple(spec.dataset_names))
        for spec in specs
    ]
    together.check_together(parts)
    if len({spec.base for spec in specs}) > 1:
        raise BadRequest("adapters that are trained together need one base; give all of them the same")
    return parts


def train_key(stages: StageCache, spec: trainer_pb2.TrainSpec, settings: TrainSettings) -> str:
    """Key of a training, to its end or to where it pauses: equal base, data, settings and code give equal weights."""
    pause = {"until_step": settings.until_step} if settings.until_step else {}
    return stages.key("train", {**work.plain(settings), **pause}, [spec.base, *spec.datasets])


def paused_key(stages: StageCache, spec: trainer_pb2.TrainSpec, settings: TrainSettings) -> str:
    """Key of where a training paused last."""
    return stages.key("train-paused", work.plain(settings), [spec.base, *spec.datasets])


def noise_key(stages: StageCache, base: str, data: str, method: str) -> str:
    """Key of the newest record that tells the gradient noise scale of a method on this base and these data."""
    return stages.key("train-noise", {"method": method}, [base, data])


async def newest_pause(tools: Tools, spec: trainer_pb2.TrainSpec, settings: TrainSettings) -> Manifest | None:
    """What a training stored when it paused last; None if nothing of it is stored."""
    digest = await tools.stages.get(paused_key(tools.stages, spec, settings))
    return None if digest is None else await asyncio.to_thread(tools.store.get_manifest, digest)


async def begun(tools: Tools, spec: trainer_pb2.TrainSpec, settings: TrainSettings) -> Manifest | None:
    """The pause that a training goes on from; None if there is none, or it is beyond where this one pauses."""
    found = await newest_pause(tools, spec, settings)
    is_beyond = found is not None and 0 < settings.until_step < found.config["step"]
    return None if is_beyond else found


async def announce(tools: Tools, manifest: Manifest, *, name: str, job_id: str) -> None:
    """Gives a proven bundle its name, if it has one, and tells the world; of a paused run nothing. Safe to repeat."""
    if manifest.artifact_type == PAUSED_TYPE:
        return
    if name:
        await tools.catalog.set(name, manifest.digest, BUNDLE_TYPE, manifest.size_bytes)
    stored = event_pb2.BundleStored(
        digest=manifest.digest, name=name, operation="train", job_id=job_id, size_bytes=manifest.size_bytes
    )
    await tools.bus.publish_event("trainer.bundle.stored", stored)
