"""The blocking half of a training job: files into place, the training process watched, its result stored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from services.trainer.forecast import Pace
from services.trainer.launch import TrainingProcesses
from services.trainer.paces import Paces
from services.trainer.plan import Prepared, plan_of, prepare
from services.trainer.records import METRICS_FILE
from services.trainer.settings import ShapeSettings, TrainSettings
from services.trainer.shape import shaped
from smeltkit import limits
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.publish import store_bundle
from smeltkit.blobs.store import Store
from smeltkit.errors import NotBuilt, all_errors
from smeltkit.gpus.ledger import Lease
from smeltkit.ids import digest_bytes
from smeltkit.jobs.plan import Plan
from smeltkit.manifest import Manifest, canonical_json
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.revision import code_revision

Tell = Callable[[int], None]
_RECORDED: Final = ("heldout", "dequantization")
"""What a training finds out that stays with its result."""


class Phases(Protocol):
    """Gives the function that tells how much of a named phase is done; it may raise to stop the work."""

    def phase(self, name: str, total: int, unit: str = "bytes", message: Callable[[], str] | None = None) -> Tell:
        """`message` is asked for a line for people whenever progress is told."""


def plan_training(
    store: Store,
    cache: NodeCache,
    manifest: Manifest,
    data: tuple[str, ...],
    settings: TrainSettings,
    folder: Path,
    paces: Paces | None,
) -> Plan:
    """The plan of training a stored base on stored data, read into the empty `folder`; without `paces` no time."""
    prepared, pace = prepare_training(store, cache, manifest, data, settings, folder, paces)
    return plan_of(prepared, manifest.size_bytes, pace)


def prepare_training(
    store: Store,
    cache: NodeCache,
    manifest: Manifest,
    data: tuple[str, ...],
    settings: TrainSettings,
    folder: Path,
    paces: Paces | None,
) -> tuple[Prepared, Pace | None]:
    """The data of a training, read into `folder` and put in order, and its pace where that is asked for and known."""
    files = _fetch(store, data, folder)
    with cache.materialize(manifest) as base:
        prepared = prepare(base, Bundle.from_manifest(manifest), files[0], files[1], settings)
        return prepared, paces.of(prepared) if paces and not prepared.refusals else None


def train(
    store: Store,
    cache: NodeCache,
    manifest: Manifest,
    data: tuple[str, ...],
    settings: TrainSettings,
    folder: Path,
    phases: Phases,
    *,
    paces: Paces,
    told: Callable[[dict[str, Any]], None],
    lease: Lease,
) -> tuple[Manifest, dict[str, Any]]:
    """Trains in `folder` on the GPUs of `lease`, going on from the checkpoints there; the stored bundle, the outcome.

    `told` gets the report of a step now and then. The training process's own error is raised again; NotBuilt where
    torch is not installed.
    """
    check_torch()
    with cache.materialize(manifest) as base:
        spec = {**base_spec(manifest, base, paces, lease), **run_spec(store, manifest, data, settings, folder)}
        (folder / "spec.json").write_text(json.dumps(spec))
        outcome = follow("train_process", folder, phases, told, processes=settings.processes, lease=lease)
    raise_error(outcome)
    return store_trained(store, manifest, data, settings, folder, outcome, phases), outcome


def check_torch() -> None:
    """NotBuilt where torch is not installed."""
    if find_spec("torch") is None:
        raise NotBuilt("torch is not installed here; install the trainer's extra: pip install 'smelt[trainer]'")


def config_of(cache: NodeCache, manifest: Manifest, settings: TrainSettings) -> ModelConfig:
    """Dimensions of the model that is trained from a stored base."""
    config = Bundle.from_manifest(manifest).config
    if settings.shape == ShapeSettings():
        return config
    with cache.materialize(manifest) as base:
        return shaped(base, config, settings.shape)


def base_spec(manifest: Manifest, base: Path, paces: Paces, lease: Lease) -> dict[str, Any]:
    """What a training process is told of the base in folder `base`, and of this machine."""
    bundle = Bundle.from_manifest(manifest)
    return {
        "base": str(base),
        "lineage": bundle.lineage.to_dict(),
        "licence": bundle.licence,
        "threads": paces.threads,
        "paces": str(paces.folder),
        "gpu_bytes": lease.memory_bytes if lease.is_shared else 0,
    }


def run_spec(
    store: Store, manifest: Manifest, data: tuple[str, ...], settings: TrainSettings, folder: Path
) -> dict[str, Any]:
    """What a training process is told of one run, its data fetched into `folder`."""
    files, parameters = _fetch(store, data, folder), plain(settings)
    return {
        "settings": parameters,
        "data": str(files[0]),
        "heldout": str(files[1] or ""),
        "run_digest": digest_bytes(canonical_json([manifest.digest, *data, parameters, code_revision()])),
    }


def store_trained(
    store: Store,
    manifest: Manifest,
    data: tuple[str, ...],
    settings: TrainSettings,
    folder: Path,
    outcome: dict[str, Any],
    phases: Phases,
) -> Manifest:
    """Stores the bundle that a run left in `folder`, with its lineage."""
    bundle = Bundle.from_manifest(manifest)
    lineage = Lineage(
        operation="train",
        inputs=(manifest.digest, *data),
        parameters={"settings": plain(settings)} | {key: outcome[key] for key in _RECORDED if key in outcome},
        code_revision=code_revision(),
        origin=bundle.lineage.origin,
    )
    result = folder / "bundle"
    trained = Bundle.from_folder(result, lineage=lineage, licence=bundle.licence)
    size_bytes = sum(path.stat().st_size for path in result.iterdir())
    return store_bundle(store, result, trained, phases.phase("store", size_bytes))


def raise_error(outcome: dict[str, Any]) -> None:
    """Raises the error that a training process ended with, if it did."""
    if "reason" in outcome:
        raise all_errors()[outcome["reason"]](outcome["message"])


def plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain JSON values, every default spelled out."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return value


def follow(
    module: str,
    folder: Path,
    phases: Phases,
    told: Callable[[dict[str, Any]], None],
    *,
    lease: Lease,
    processes: int = 1,
) -> dict[str, Any]:
    """Runs a training, by the name of its module, to its end, telling its steps; what it left as outcome."""
    latest: dict[str, Any] = {}

    def message() -> str:
        rate, left = latest.get("tokens_per_second", 0.0), latest.get("left_s", 0.0)
        return f"loss {latest.get('loss', 0.0):.4f}  {rate:.0f} tokens/s  {left:.0f} s left" if latest else ""

    training = TrainingProcesses(module, folder, processes, lease)
    try:
        tell, began = phases.phase("prepare", 0, "steps", message), time.monotonic()
        while training.are_running():
            time.sleep(limits.TRAIN_POLL_S)
            newest = _last_line(folder / METRICS_FILE)
            if newest and not latest:
                tell = phases.phase("train", newest["steps"], "steps", message)
                first_step, began = newest["step"], time.monotonic()
            if newest and newest["step"] != latest.get("step"):
                done = newest["step"] - first_step
                pace = (time.monotonic() - began) / done if done > 0 else 0.0
                latest.update(newest, left_s=pace * (newest["steps"] - newest["step"]))
                told(newest)
            tell(latest.get("step", 0))
    finally:
        training.stop()
    return training.outcome()


def _fetch(store: Store, digests: tuple[str, ...], folder: Path) -> tuple[Path, Path | None]:
    """Training data and, if named, held-out data as files of `folder`."""
    paths: list[Path] = []
    for name, digest in zip(("data.jsonl", "heldout.jsonl"), digests, strict=False):
        paths.append(folder / name)
        if not paths[-1].exists():
            store.fetch(digest, paths[-1])
    return paths[0], paths[1] if len(paths) > 1 else None


def _last_line(path: Path) -> dict[str, Any]:
    """The newest whole line of a metrics file, empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 65_536, 0))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    value: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return value
