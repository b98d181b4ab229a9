"""Checkpoints: everything that a later process needs to go on as if nothing had happened, whole or not at all.

    step-00000050/part-0.bin        what the first process holds of trainable parameters and optimizer state
    step-00000050/.metadata         which part of which tensor is where, with its digest
    step-00000050/progress.json     last of all: step, settings and inputs by digest, losses so far, digest of .metadata

The state is copied and the run goes on while a thread writes it under another name; it is read back by digest and
renamed last. Each process reads the parts that it needs, of however many processes wrote them. A resumed run reads a
checkpoint and writes others of its own beside it, never into it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from services.trainer.checkpoints.files import METADATA_FILE, PartsReader, PartsWriter
from services.trainer.parallel.ranks import ALONE, Ranks
from services.trainer.parallel.sharding import held, spread_as
from smeltkit.errors import DigestMismatch, SettingsDiffer, TrainingDiverged
from smeltkit.ids import digest_bytes

PROGRESS_FILE: Final = "progress.json"
_ALIGNED: Final = 64
"""Bytes at a multiple of which each tensor begins."""
RANDOM: Final = "random."
"""What the names of generators' states among the tensors begin with."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, as plain values."""

    step: int
    """Optimizer steps done."""
    run_digest: str
    """Digest of settings, base and data: what a run must share with a checkpoint to go on from it."""
    codes: tuple[tuple[str, int], ...]
    """Revisions of the code that did the steps, oldest first, each with the steps done before it."""
    tokens: int
    """Tokens seen."""
    time_s: float
    """Seconds of its steps."""
    spikes: Mapping[str, Any]
    """State of the guard against spikes."""
    losses: tuple[float, ...]
    """Latest losses, the newest last: what a stuck run is told by."""


class Checkpoints:
    """The checkpoints of a run below `folder`, of which the newest `keep` stay; each of `ranks` has one of these."""

    def __init__(self, folder: Path, *, keep: int, ranks: Ranks = ALONE) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def start(self, progress: Progress, tensors: Mapping[str, Tensor], *, kept_step: int = 0) -> None:
        """Takes a copy of what this process holds of the state; it is written while the run goes on. The checkpoint of
        `kept_step` stays beside the newest.

        TrainingDiverged, in all processes, for a value that is not finite: such a checkpoint is never written. Waits
        for the one before, and raises what was wrong with it.
        """
        self.wait()
        broken = next((name for name, value in tensors.items() if not _is_finite(held(value))), "")
        if self._ranks.any(bool(broken)):
            where = broken or "what another process has of the state"
            raise TrainingDiverged(f"{where} holds values that are not finite; the checkpoint was not written")
        self._pending = self._thread.submit(self._write, progress, self._copied(tensors), kept_step)

    def wait(self) -> None:
        """Returns once the checkpoint under way is there, for all processes; its error, if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as failed:
            raise next(error for error, _ in failed.failures.values()) from failed

    @torch.no_grad()
    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state in memory of the host that is used again for the next one."""
        fresh = {name: held(value) for name, value in tensors.items() if name not in self._copies}
        for name, room in zip(fresh, self._rooms(list(fresh.values())), strict=True):
            self._copies[name] = spread_as(room, tensors[name])
        for name, value in tensors.items():
            held(self._copies[name]).copy_(held(value), non_blocking=True)
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in tensors}

    def _rooms(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Memory of the host for tensors, one after the other; where a GPU copies, pinned for as long as this lives.

        torch's own pinned memory rounds each tensor up to a power of two, which is up to twice of what is asked for.
        """
        sizes = [-(-value.nbytes // _ALIGNED) * _ALIGNED for value in values]
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        if sizes and any(value.is_cuda for value in values):
            driver: Any = torch.cuda.cudart()
            if code := int(driver.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)):
                raise torch.cuda.CudaError(code)
            weakref.finalize(self, driver.cudaHostUnregister, whole.data_ptr()).atexit = False
        return [
            piece[: value.nbytes].view(value.dtype).view(value.shape)
            for piece, value in zip(whole.split(sizes), values, strict=True)
        ]

    def _write(self, progress: Progress, tensors: dict[str, Tensor], kept_step: int) -> None:
        fresh = self._folder / f".{_name(progress.step)}.new"
        if self._ranks.is_first:
            shutil.rmtree(fresh, ignore_errors=True)
        writer = PartsWriter(fresh, lambda: self._commit(fresh, progress, kept_step))
        save_parts(tensors, storage_writer=writer, process_group=self._ranks.background, no_dist=self._ranks.count == 1)

    def _commit(self, fresh: Path, progress: Progress, kept_step: int) -> None:
        """Gives a checkpoint that is all there its name, and removes those that are too old."""
        target = self._folder / _name(progress.step)
        told = {**asdict(progress), "metadata_digest": _metadata(fresh)[0]}
        (fresh / PROGRESS_FILE).write_text(json.dumps(told, sort_keys=True))
        for path in (fresh / PROGRESS_FILE, fresh):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
        _sync(self._folder)
        for old in _all(self._folder)[: -self._keep]:
            if old.name != _name(kept_step):
                shutil.rmtree(old)


class Stored:
    """A checkpoint that was written whole."""

    def __init__(self, folder: Path) -> None:
        """Reads what says where it stands; DigestMismatch unless that is, byte for byte, what was written."""
        told: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
        self._folder = folder
        digest, data = _metadata(folder)
        if digest != told.pop("metadata_digest"):
            raise DigestMismatch(
                f"{folder.name}: {METADATA_FILE} is not what was written; remove it to go on from an older one"
            )
        if told.keys() != {field.name for field in fields(Progress)}:
            raise SettingsDiffer(
                f"{folder.name} was written by code that keeps other facts of a run; go on with that code, or start the"
                " training again"
            )
        codes = tuple((revision, step) for revision, step in told["codes"])
        self.progress = Progress(**{**told, "codes": codes, "losses": tuple(told["losses"])})
        found: Mapping[str, TensorStorageMetadata] = pickle.loads(data).state_dict_metadata
        self.forms = {name: (one.size, one.properties.dtype) for name, one in found.items()}
        """Shape and type of each tensor, whole."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fills the named tensors, of those that are spread what this process holds; DigestMismatch as `Stored`."""
        try:
            load_parts(tensors, storage_reader=PartsReader(self._folder), no_dist=True)
        except CheckpointException as failed:
            raise next(error for error, _ in failed.failures.values()) from failed


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`, None if there is none. What was not finished does not count."""
    found = _all(folder)
    return found[-1] if found else None


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step below `folder`, which must be there."""
    return folder / _name(step)


def read(folder: Path, prefix: str = "") -> tuple[Progress, dict[str, Tensor]]:
    """The checkpoint in `folder`, its tensors whole; of those only whose names begin with `prefix`."""
    stored = Stored(folder)
    forms = {name: form for name, form in stored.forms.items() if name.startswith(prefix)}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in forms.items()}
    stored.load(tensors)
    return stored.progress, tensors


def check_same_run(progress: Progress, run_digest: str) -> None:
    """Raises SettingsDiffer if a checkpoint is that of another run."""
    if progress.run_digest != run_digest:
        raise SettingsDiffer(
            f"the checkpoint of step {progress.step} is of another run ({progress.run_digest[:19]}), not of this one"
            f" ({run_digest[:19]}): settings, base or data changed. Start in an empty folder"
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _metadata(folder: Path) -> tuple[str, bytes]:
    data = (folder / METADATA_FILE).read_bytes()
    return digest_bytes(data), data


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
