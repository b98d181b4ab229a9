"""The blocking half of a training job: files into place, the training process watched, its result stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from services.trainer.checkpoints.paused import store_paused, take_up
from services.trainer.costs.forecast import Pace
from services.trainer.costs.memory import CONTEXT_BYTES
from services.trainer.costs.paces import Paces
from services.trainer.data.kept import Kept, keep_samples, names_of
from services.trainer.data.recipe import Recipe
from services.trainer.data.tokenize import Tell
from services.trainer.plan import Prepared, plan_of, prepare
from services.trainer.run.noise import advice
from services.trainer.settings.training import OBSERVING, ShapeSettings, TrainSettings
from services.trainer.shape import shaped
from services.trainer.tracking.follow import Phases, Told, follow
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.publish import store_bundle
from smeltkit.blobs.store import Store
from smeltkit.errors import BadConfig, NotBuilt, SmeltError, all_errors
from smeltkit.gpus.ledger import Lease
from smeltkit.ids import digest_bytes
from smeltkit.jobs.plan import Plan
from smeltkit.manifest import Manifest, canonical_json
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.revision import code_revision

_RECORDED: Final = ("heldout", "dequantization", "codes", "stopped", "best")
"""What a training finds out that stays with its result."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a training is made of."""

    store: Store
    cache: NodeCache
    manifest: Manifest
    """The base."""
    data: tuple[str, ...]
    """By digest: the training rows of its files, then held-out ones if any."""
    settings: TrainSettings
    folder: Path
    """Where its files are brought and made."""
    begun: Manifest | None = None
    """The paused run that it goes on from."""
    names: tuple[str, ...] = ()
    """What messages call each of `data`; empty where nobody has named them."""


def plan_training(inputs: Inputs, paces: Paces | None, similar: Manifest | None) -> Plan:
    """The plan of a training, its data read into the empty folder; without `paces` no time. Where it goes on from a
    paused run its time is that of what is left.

    `similar` is the record of a training of the same base on the same data, by whose noise scale its steps are judged.
    """
    prepared, pace, items = prepare_training(inputs, paces)
    plan = plan_of(prepared, inputs.manifest.size_bytes, pace)
    if similar is not None and not prepared.refusals:
        told = advice(similar.config["noise_scale"], prepared.step_tokens)
        items |= {"size of steps": f"{told}, as {similar.digest[:19]} measured"} if told else {}
    plan = left_of(inputs, prepared, plan)
    beyond = beyond_budget(inputs.settings, plan.time_s)
    return replace(plan, items={**plan.items, **items}, refusals=(*plan.refusals, *beyond))


def left_of(inputs: Inputs, prepared: Prepared, plan: Plan) -> Plan:
    """What is left of a plan for a training that goes on from a paused run."""
    if inputs.begun is None or prepared.refusals:
        return plan
    begun = inputs.begun.config
    told = f"step {begun['step']}, which is stored; time is that of the steps after it"
    left, counts = 1 - begun["cost"]["tokens"] / prepared.tokens, {**plan.counts, "steps_stored": begun["step"]}
    return replace(plan, time_s=plan.time_s * left, counts=counts, items={**plan.items, "goes on from": told})


def take_up_begun(inputs: Inputs) -> None:
    """Puts the paused run that a training goes on from into its folder, unless it has begun there."""
    if inputs.begun is not None:
        take_up(inputs.store, inputs.begun, inputs.folder)


def beyond_budget(settings: TrainSettings, time_s: float) -> list[SmeltError]:
    """Why a training that is foreseen to take that long is refused; nothing where its time is not known (0)."""
    hours = time_s * settings.processes / 3600
    if not settings.hours_max or hours <= settings.hours_max:
        return []
    return [
        BadConfig(
            f"hours_max={settings.hours_max:g} device hours, but {hours:.3g} are foreseen; lower max_steps or epochs,"
            " or raise it"
        )
    ]


def prepare_training(inputs: Inputs, paces: Paces | None) -> tuple[Prepared, Pace | None, dict[str, str]]:
    """The data of a training, tokenized and put in order, its pace where that is asked for and known, and what a plan
    says of tokenizing."""
    with inputs.cache.materialize(inputs.manifest) as base:
        kept = _tokenized(inputs, base, lambda rows: None)
        paths = [one.path for one in kept]
        count = inputs.settings.files
        heldout = paths[-1] if len(paths) > count else None
        prepared = prepare(base, Bundle.from_manifest(inputs.manifest), paths[:count], heldout, inputs.settings)
        processes = max(one.processes for one in kept)
        told = f"now, and kept for the run; processes: {processes}" if processes else "before, and kept since"
        return prepared, paces.of(prepared) if paces and not prepared.refusals else None, {"tokenized": told}


def train(
    inputs: Inputs, phases: Phases, *, paces: Paces, told: Told, lease: Lease, exports: Mapping[str, Any], address: str
) -> dict[str, Any]:
    """Trains on the GPUs of `lease`, going on from the checkpoints in the folder, or else from the paused run; the
    outcome, see `store_result`.

    `told` hears of steps and alerts; `exports` is what `open_exports` is told; other machines come to `address`. The
    training process's own error is raised again; NotBuilt where torch is not installed.
    """
    check_torch()
    folder = inputs.folder
    take_up_begun(inputs)
    with inputs.cache.materialize(inputs.manifest) as base:
        spec = {
            **base_spec(inputs.manifest, base, paces, lease),
            "exports": exports,
            **run_spec(inputs, base, phases),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        outcome = follow("train_process", folder, phases, told, (inputs.settings,), lease=lease, address=address)
    raise_error(outcome)
    return outcome


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
        "gpu_bytes": max(lease.memory_bytes - CONTEXT_BYTES, 1) if lease.is_shared else 0,
    }


def run_spec(inputs: Inputs, base: Path, phases: Phases) -> dict[str, Any]:
    """What a training process is told of one run, its data tokenized by the base in folder `base`."""
    tell, parameters = phases.phase("tokenize", 0, "rows"), plain(inputs.settings)
    paths = [str(one.path) for one in _tokenized(inputs, base, tell)]
    return {
        "settings": _all(inputs.settings),
        "data": paths[: inputs.settings.files],
        "heldout": "".join(paths[inputs.settings.files :]),
        "run_digest": digest_bytes(canonical_json([inputs.manifest.digest, *inputs.data, parameters])),
    }


def store_result(inputs: Inputs, outcome: Mapping[str, Any], phases: Phases) -> Manifest:
    """Stores what a run left in its folder: its bundle, or its state if it paused."""
    if "paused" not in outcome:
        return store_trained(inputs, outcome, phases)
    about = {"base": inputs.manifest.digest, "data": list(inputs.data), "settings": plain(inputs.settings)}
    return store_paused(inputs.store, inputs.folder, about, outcome, phases.phase("store", 0))


def store_trained(inputs: Inputs, outcome: Mapping[str, Any], phases: Phases) -> Manifest:
    """Stores the bundle that a run left in its folder, with its lineage."""
    bundle = Bundle.from_manifest(inputs.manifest)
    lineage = Lineage(
        operation="train",
        inputs=(inputs.manifest.digest, *inputs.data),
        parameters={"settings": plain(inputs.settings)} | {key: outcome[key] for key in _RECORDED if key in outcome},
        code_revision=code_revision(),
        origin=bundle.lineage.origin,
    )
    result = inputs.folder / "bundle"
    trained = Bundle.from_folder(result, lineage=lineage, licence=bundle.licence)
    size_bytes = sum(path.stat().st_size for path in result.iterdir())
    return store_bundle(inputs.store, result, trained, phases.phase("store", size_bytes))


def raise_error(outcome: dict[str, Any]) -> None:
    """Raises the error that a training process ended with, if it did."""
    if "reason" in outcome:
        raise all_errors()[outcome["reason"]](outcome["message"])


def plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain JSON values, every default spelled out, without those that do not change what is trained."""
    return {key: value for key, value in _all(settings).items() if key not in OBSERVING}


def _all(settings: TrainSettings) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return value


def _tokenized(inputs: Inputs, base: Path, tell: Tell) -> list[Kept]:
    """The files of all stages and, if named, held-out data as samples in the folder; equal ones are kept once."""
    contract, settings = Bundle.from_manifest(inputs.manifest).contract, inputs.settings

    def kept(number: int) -> Kept:
        recipe = Recipe.of(contract, settings, is_heldout=number == count)
        digest, name = inputs.data[number], names[number]
        return keep_samples(inputs.store, inputs.cache, digest, base, recipe, inputs.folder, name, tell)

    count = settings.files
    files, names = inputs.data[:count], names_of(count, len(inputs.data) > count, inputs.names)
    found = {digest: kept(files.index(digest)) for digest in dict.fromkeys(files)}
    return [*(found[digest] for digest in files), *(kept(number) for number in range(count, len(inputs.data)))]
