"""Runs that pause: what one of them has so far as an artifact, from which the same run goes on in another job.

    checkpoints/step-00000030/...    its newest checkpoint, and that of its best measurement if it keeps one
    metrics.jsonl, heldout.jsonl     its steps and held-out measurements

Its description says where it stands and what it reached. Only the run that wrote it, of the same base, data, settings
and code, goes on from it: what that makes is what it would have made without a pause.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from services.trainer.run.measured import HELDOUT_FILE
from services.trainer.tracking.records import METRICS_FILE
from smeltkit.blobs.store import Store
from smeltkit.manifest import PAUSED_TYPE, Descriptor, Manifest

CHECKPOINTS: Final = "checkpoints"
_BYTES: Final = "application/octet-stream"


def store_paused(
    store: Store, folder: Path, about: Mapping[str, Any], outcome: Mapping[str, Any], tell: Callable[[int], None]
) -> Manifest:
    """Stores what a run left in `folder` when it paused with that outcome; `about` is what it is a run of.

    `tell` hears of bytes that are stored.
    """
    held = [path for name in outcome["checkpoints"] for path in sorted((folder / CHECKPOINTS / name).iterdir())]
    paths = [*held, *(folder / name for name in (METRICS_FILE, HELDOUT_FILE))]
    layers, done = [], 0
    for path in paths:
        if not path.is_file():
            continue
        digest, size_bytes = store.put_file(path)
        done += size_bytes
        tell(done)
        name = path.relative_to(folder).as_posix()
        layers.append(Descriptor(media_type=_BYTES, digest=digest, size_bytes=size_bytes, path=name))
    config = {
        **about,
        "step": outcome["paused"],
        "cost": outcome["cost"],
        "device": outcome["device"],
        "heldout": outcome.get("heldout"),
    }
    manifest = Manifest(artifact_type=PAUSED_TYPE, config=config, layers=tuple(layers))
    store.put_manifest(manifest)
    return manifest


def take_up(store: Store, paused: Manifest, folder: Path) -> None:
    """Puts a paused run into `folder`, its checkpoint last and whole, unless the folder has one already."""
    target = folder / CHECKPOINTS
    if any(target.glob("step-*")):
        return
    fresh = folder / ".paused.new"
    shutil.rmtree(fresh, ignore_errors=True)
    for layer in paused.layers:
        path = fresh / layer.path
        path.parent.mkdir(parents=True, exist_ok=True)
        store.fetch(layer.digest, path)
    for path in fresh.iterdir():
        if path.name != CHECKPOINTS:
            path.replace(folder / path.name)
    shutil.rmtree(target, ignore_errors=True)
    (fresh / CHECKPOINTS).rename(target)
    fresh.rmdir()
