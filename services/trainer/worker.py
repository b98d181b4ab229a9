"""Jobs to domain: train. A name is given to a bundle only after it generated.

A run's folder belongs to its job, not to an attempt: whoever takes the job over on this machine goes on from its last
checkpoint; on another machine it starts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smelt.event.v1 import event_pb2
from smelt.trainer.v1 import trainer_pb2

from services.trainer import records, work
from services.trainer.config import TrainerConfig
from services.trainer.events import StepEvents
from services.trainer.paces import Paces
from services.trainer.run_folders import RunFolders
from services.trainer.settings import TrainSettings, parse_settings
from smeltkit import probing
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.store import Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.errors import BadRequest
from smeltkit.jobs import threads
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.threads import Reporter
from smeltkit.jobs.worker import Handler, JobContext
from smeltkit.locks import file_lock
from smeltkit.manifest import BUNDLE_TYPE, Manifest
from smeltkit.telemetry import span
from smeltkit.workspaces import Workspaces

METHODS: Mapping[int, str] = {
    trainer_pb2.METHOD_PRETRAIN: "pretrain",
    trainer_pb2.METHOD_FULL: "full",
    trainer_pb2.METHOD_LORA: "lora",
    trainer_pb2.METHOD_QLORA: "qlora",
}
"""Method of the contract to the settings' word; others are not built yet."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the trainer works with."""

    config: TrainerConfig
    store: Store
    cache: NodeCache
    workspaces: Workspaces
    stages: StageCache
    catalog: Catalog
    bus: Bus
    prober: probing.Prober
    folders: RunFolders
    paces: Paces


class Handlers:
    """The kinds of jobs of the trainer."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def by_kind(self) -> Mapping[str, Handler]:
        """Kind of job to what does it."""
        return {"train": self.train}

    async def train(self, context: JobContext) -> str:
        """Trains what a TrainSpec names, proves that the result generates, names it; its digest."""
        spec = trainer_pb2.TrainSpec.FromString(context.request)
        tools, settings, data = self._tools, settings_of(spec), tuple(spec.datasets)
        key = train_key(tools.stages, spec, settings)
        digest = await tools.stages.get(key)
        folder = tools.folders.of(context.job_id)
        if digest is None:
            manifest = await threads.run(context, tools.store.get_manifest, spec.base)
            folder.mkdir(parents=True, exist_ok=True)
            with file_lock(tools.folders.lock_of(context.job_id)), span("smelt.trainer.train"):
                made, outcome = await threads.run(
                    context, work.train, tools.store, tools.cache, manifest, data, settings, folder, Reporter(context),
                    paces=tools.paces, told=StepEvents(tools.bus, context.job_id).tell,
                )  # fmt: skip
            digest = made.digest
            await context.progress("probe", 0, 1)
            with span("smelt.trainer.probe"):
                await probing.prove(tools.prober, tools.store, digest)
            await context.check_alive()
            finished = await threads.run(
                context, records.store_run, tools.store, folder, context.job_id, digest, outcome
            )
            await tools.bus.publish_event("trainer.training.finished", finished)
            await tools.stages.put(key, digest)
        await context.check_alive()
        stored = await threads.run(context, tools.store.get_manifest, digest)
        await announce(tools, stored, name=spec.name, job_id=context.job_id)
        return digest


def settings_of(spec: trainer_pb2.TrainSpec) -> TrainSettings:
    """The settings of a request, checked; BadConfig, or BadRequest where the method is said twice and differently."""
    settings = parse_settings(spec.settings_json)
    if METHODS.get(spec.method, "") != settings.method:
        asked = trainer_pb2.Method.Name(spec.method)
        built = ", ".join(METHODS.values())
        raise BadRequest(f"the request says {asked}, its settings method={settings.method}; built are {built}")
    if not 1 <= len(spec.datasets) <= 2:
        raise BadRequest(f"{len(spec.datasets)} data sets are named; give the training data, then held-out data if any")
    return settings


def train_key(stages: StageCache, spec: trainer_pb2.TrainSpec, settings: TrainSettings) -> str:
    """Key of a training: equal base, data, settings and code give equal weights."""
    return stages.key("train", work.plain(settings), [spec.base, *spec.datasets])


async def announce(tools: Tools, manifest: Manifest, *, name: str, job_id: str) -> None:
    """Gives a proven bundle its name, if it has one, and tells the world. Safe to repeat."""
    if name:
        await tools.catalog.set(name, manifest.digest, BUNDLE_TYPE, manifest.size_bytes)
    stored = event_pb2.BundleStored(
        digest=manifest.digest, name=name, operation="train", job_id=job_id, size_bytes=manifest.size_bytes
    )
    await tools.bus.publish_event("trainer.bundle.stored", stored)
