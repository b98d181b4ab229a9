"""Adapters that are trained together: what they must share, what that takes, and the blocking half of their job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from services.trainer import work
from services.trainer.costs.memory import components
from services.trainer.costs.paces import Paces
from services.trainer.plan import Prepared, plan_of
from services.trainer.settings.training import TrainSettings
from services.trainer.tracking.follow import Phases, Told, follow
from services.trainer.work import Inputs
from smeltkit import limits
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.store import Store
from smeltkit.errors import BadRequest, SmeltError, UnsupportedOption, all_errors
from smeltkit.gpus.ledger import Lease
from smeltkit.jobs.plan import Plan
from smeltkit.manifest import TOGETHER_TYPE, Manifest

SHARED: Final = ("method", "dtype", "recompute", "sequence_tokens", "pack_tokens", "processes")
"""Settings that the base in memory depends on: all adapters must have the same."""
OF_ADAPTERS: Final = ("gradients", "masters", "optimizer")
"""Components of its memory that every adapter has for itself."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the adapters that are trained together."""

    name: str
    """Name for its result."""
    data: tuple[str, ...]
    """Its data by digest: training rows, then held-out ones if any."""
    settings: TrainSettings
    files: tuple[str, ...] = ()
    """What messages call each of its data; empty where nobody has named them."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a part."""

    manifest: Manifest
    outcome: dict[str, Any]
    folder: Path
    """Where its metrics lie."""


def check_together(parts: Sequence[Part]) -> None:
    """Raises BadRequest or UnsupportedOption unless the parts can share one base in memory."""
    if not 2 <= len(parts) <= limits.TRAIN_TOGETHER_MAX:
        raise BadRequest(f"{len(parts)} adapters are to be trained together; 2 to {limits.TRAIN_TOGETHER_MAX} can be")
    names = [part.name for part in parts]
    if len(set(names)) < len(names) or not all(names):
        raise BadRequest(f"adapters that are trained together need names of their own, not {', '.join(names)}")
    first = parts[0].settings
    if not first.is_adapted:
        raise UnsupportedOption(f"method {first.method} trains the base itself; lora, qlora and ia3 train together")
    if first.processes > 1:
        raise UnsupportedOption(f"processes={first.processes} cannot share a base with adapters that take turns; set 1")
    for part in parts:
        if part.settings.hours_max:
            raise UnsupportedOption(
                f"{part.name}: hours_max is for a training of its own; adapters that are trained together share their"
                " hours, so remove it"
            )
    for part in parts[1:]:
        for key in SHARED:
            own, wanted = getattr(part.settings, key), getattr(first, key)
            if own != wanted:
                raise UnsupportedOption(
                    f"{part.name} has {key}={own!r}, {parts[0].name} {wanted!r}; adapters on one base in memory need"
                    " the same"
                )


def joint_plan(plans: Sequence[tuple[Part, Plan, Prepared]], base_bytes: int) -> Plan:
    """One plan of all parts: times add up, memory holds one base and one pack's activations and all optimizers."""
    alone = [plan for _, plan, _ in plans]
    adapters = [
        sum(components(prepared.config, part.settings)[key] for key in OF_ADAPTERS) for part, _, prepared in plans
    ]
    times = [plan.time_s for plan in alone]
    return Plan(
        read_bytes=base_bytes,
        write_bytes=sum(plan.write_bytes for plan in alone),
        memory_bytes=largest_and_adapters([plan.memory_bytes for plan in alone], adapters),
        time_s=sum(times) if all(times) else 0.0,
        steps=("fetch base and data", "tokenize", "train in turns", "merge adapters", "store bundles", "probe", "name"),
        items={f"{part.name}, {name}": value for part, plan, _ in plans for name, value in plan.items.items()},
        refusals=tuple(refusal for plan in alone for refusal in plan.refusals),
    )


def largest_and_adapters(alone: Sequence[int], adapters: Sequence[int]) -> int:
    """Bytes of trainings on one base, from what each takes alone and its adapter of that: base and pack are there once,
    those of the largest."""
    highest = max(range(len(alone)), key=alone.__getitem__)
    return alone[highest] + sum(adapters) - adapters[highest]


def inputs_of(
    store: Store, cache: NodeCache, manifest: Manifest, parts: Sequence[Part], folder: Path,
    begun: Sequence[Manifest | None],
) -> list[Inputs]:  # fmt: skip
    """What each part is made of, in a new or known folder of its own below `folder`; `begun` are the paused runs that
    they go on from."""
    found = []
    for number, (part, pause) in enumerate(zip(parts, begun, strict=True)):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        found.append(
            Inputs(
                store=store, cache=cache, manifest=manifest, data=part.data, settings=part.settings, folder=own,
                begun=pause, names=part.files,
            )
        )  # fmt: skip
    return found


def plan_parts(parts: Sequence[Part], inputs: Sequence[Inputs], paces: Paces | None) -> Plan:
    """The plan of training `parts` together on their base, their data read into empty folders."""
    base_bytes, found = inputs[0].manifest.size_bytes, []
    for part, own in zip(parts, inputs, strict=True):
        prepared, pace, items = work.prepare_training(own, paces)
        plan = work.left_of(own, prepared, plan_of(prepared, base_bytes, pace))
        found.append((part, replace(plan, items={**plan.items, **items}), prepared))
    return joint_plan(found, base_bytes)


def train_parts(
    parts: Sequence[Part],
    inputs: Sequence[Inputs],
    folder: Path,
    phases: Phases,
    *,
    paces: Paces,
    told: Told,
    lease: Lease,
    exports: Mapping[str, Any],
) -> dict[str, Any]:
    """Trains `parts` together in `folder` on the GPU of `lease`, going on from what lies there; the outcome, see
    `store_parts`."""
    work.check_torch()
    manifest, runs = inputs[0].manifest, []
    with inputs[0].cache.materialize(manifest) as base:
        for part, own in zip(parts, inputs, strict=True):
            work.take_up_begun(own)
            named = {"name": part.name, "exports": {**exports, "name": part.name}}
            runs.append({**named, **work.run_spec(own, base, phases)})
        spec = {**work.base_spec(manifest, base, paces, lease), "runs": runs}
        (folder / "spec.json").write_text(json.dumps(spec))
        outcome = follow("together_process", folder, phases, told, [part.settings for part in parts], lease=lease)
    work.raise_error(outcome)
    return outcome


def store_parts(
    parts: Sequence[Part], inputs: Sequence[Inputs], outcome: Mapping[str, Any], phases: Phases
) -> list[Made | SmeltError]:
    """Stores what a joint training made; what became of each part, in their order."""
    found: list[Made | SmeltError] = []
    for part, own, reached in zip(parts, inputs, outcome["runs"], strict=True):
        if "reason" in reached:
            found.append(all_errors()[reached["reason"]](f"{part.name}: {reached['message']}"))
            continue
        reached |= {"alerts": outcome["alerts"], "together": len(parts)}
        manifest = work.store_result(own, reached, phases)
        found.append(Made(manifest=manifest, outcome=reached, folder=own.folder))
    return found


def together_manifest(parts: Sequence[Part], digests: Sequence[str]) -> Manifest:
    """The result of a joint training: its bundles by name."""
    made = {part.name: digest for part, digest in zip(parts, digests, strict=True)}
    return Manifest(artifact_type=TOGETHER_TYPE, config={"bundles": made})
