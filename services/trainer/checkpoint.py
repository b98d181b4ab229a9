"""Checkpoints: everything that a later process needs to go on as if nothing had happened, whole or not at all.

    step-00000050/state.safetensors     trainable parameters, optimizer state, state of the random generators
    step-00000050/progress.json         step, settings and inputs by digest, losses so far, digest of the state

A checkpoint is written under another name, read back by digest, and renamed last. A resumed run reads it and writes
checkpoints of its own beside it, never into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from smeltkit.errors import DigestMismatch, SettingsDiffer, TrainingDiverged
from smeltkit.ids import digest_file
from smeltkit.ml.decoder_weights import to_numpy, to_torch, type_name
from smeltkit.ml.safetensors_io import SafetensorsFolder, read_header, write_safetensors

STATE_FILE: Final = "state.safetensors"
PROGRESS_FILE: Final = "progress.json"
RANDOM: Final = "random."
"""What the names of generators' states among the tensors begin with."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, as plain values."""

    step: int
    """Optimizer steps done."""
    run_digest: str
    """Digest of settings, base and data: what a run must share with a checkpoint to go on from it."""
    tokens: int
    """Tokens seen."""
    time_s: float
    """Seconds of its steps."""
    spikes: Mapping[str, Any]
    """State of the guard against spikes."""
    losses: tuple[float, ...]
    """Latest losses, the newest last: what a stuck run is told by."""


def save(folder: Path, progress: Progress, tensors: Mapping[str, Tensor], *, keep: int) -> Path:
    """Writes the checkpoint of `progress` below `folder` and removes all but the newest `keep`; its folder.

    TrainingDiverged for a value that is not finite: such a checkpoint is never written.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TrainingDiverged(f"{name} holds values that are not finite; the checkpoint was not written")
    target, fresh = folder / f"step-{progress.step:08d}", folder / f".step-{progress.step:08d}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    state = fresh / STATE_FILE
    write_safetensors(state, ((name, _type(value), to_numpy(value.cpu())) for name, value in tensors.items()))
    _sync(state)
    with state.open("rb") as file:
        digest, _ = digest_file(file)
    (fresh / PROGRESS_FILE).write_text(json.dumps({**asdict(progress), "state_digest": digest}, sort_keys=True))
    _sync(fresh / PROGRESS_FILE)
    read(fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    _sync(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`, None if there is none. What was not finished does not count."""
    found = _all(folder)
    return found[-1] if found else None


def read(folder: Path) -> tuple[Progress, dict[str, Tensor]]:
    """The checkpoint in `folder`; DigestMismatch unless its state is, byte for byte, the one that was written."""
    value: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
    with (folder / STATE_FILE).open("rb") as file:
        digest, _ = digest_file(file)
    if digest != value.pop("state_digest"):
        raise DigestMismatch(
            f"{folder.name}: {STATE_FILE} is not what was written; remove it to go on from an older one"
        )
    source = SafetensorsFolder(folder=folder, tensors=read_header(folder / STATE_FILE))
    tensors = {name: to_torch(source.read(name), info.dtype) for name, info in source.tensors.items()}
    return Progress(**{**value, "losses": tuple(value["losses"])}), tensors


def check_same_run(progress: Progress, run_digest: str) -> None:
    """Raises SettingsDiffer if a checkpoint is that of another run."""
    if progress.run_digest != run_digest:
        raise SettingsDiffer(
            f"the checkpoint of step {progress.step} is of another run ({progress.run_digest[:19]}), not of this one"
            f" ({run_digest[:19]}): settings, base or data changed. Start in an empty folder"
        )


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _type(value: Tensor) -> str:
    return "U8" if value.dtype == torch.uint8 else type_name(value.dtype)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
