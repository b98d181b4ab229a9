"""Tokenized data on this machine: made once, shared by plans, runs and those that go on, and dropped for want of room.

It lies in the node's cache, under the digests of data and recipe, so whatever changes an id or a target makes another
file. A copy that is not what was written is never trained on: it is made again.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.trainer.data.recipe import Recipe
from services.trainer.data.stored import open_sealed
from services.trainer.data.tokenize import Tell, processes_for, tokenize
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.store import Store
from smeltkit.errors import DigestMismatch

_log = logging.getLogger(__name__)
ROOM: Final = 3
"""Bytes of tokenized data for one of data, about: what is made free before it is known."""
_NAME_BYTES: Final = 100
"""Longest name of a user's that errors repeat."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Tokenized data in a run's folder."""

    path: Path
    processes: int
    """Processes that tokenized it; 0 if it was there."""


def names_of(files: int, is_measured: bool, given: Sequence[str] = ()) -> list[str]:
    """What errors call each file of training, and held-out data if it `is_measured`: by the name that is `given` to
    each, or else by what it is, since stored data have digests and no names."""
    roles = [
        f"training data, file {number} of {files}" if files > 1 else "training data" for number in range(1, files + 1)
    ]
    roles += ["held-out data"] if is_measured else []
    if not given:
        return roles
    short = (name.encode()[:_NAME_BYTES].decode(errors="ignore") for name in given)
    return [f"{name} ({role})" for name, role in zip(short, roles, strict=True)]


def keep_samples(
    store: Store, cache: NodeCache, digest: str, base: Path, recipe: Recipe, folder: Path, name: str, tell: Tell
) -> Kept:
    """The samples of stored data as FOLDER/NAME.samples, from the cache or made by several processes; every shard is
    what was written.

    Errors of `read_dataset`, which call it NAME, UnknownBlob, DiskFull. `tell` hears of rows that are done.
    """
    target, shards, made = folder / f"{name}.samples", folder / f"{name}.shards", 0

    def build(path: Path) -> None:
        nonlocal made
        shards.mkdir(exist_ok=True)
        raw = shards / name
        if not raw.exists():
            store.fetch(digest, raw)
        made = processes_for(raw.stat().st_size)
        tokenize(raw, digest, base, recipe, shards, path, processes=made, tell=tell)
        shutil.rmtree(shards)

    key, room_bytes = f"samples:{digest}:{recipe.digest(base)}", ROOM * (store.size(digest) or 0)
    for is_last in (False, True):
        with cache.derived(key, build, size_bytes=room_bytes) as file:
            try:
                open_sealed(file)
            except DigestMismatch as error:
                if is_last:
                    raise
                _log.warning("tokenized %s is made again: %s", digest[:19], error)
                os.utime(file)  # breaks the cache's seal
                continue
            target.unlink(missing_ok=True)
            os.link(file, target)
            break
    return Kept(path=target, processes=made)
