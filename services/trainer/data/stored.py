"""Samples in a file: what a process holds of a data set does not grow with it.

    ids and targets of all samples, end to end          int32 [T, 2], in shards of known digests
    where each sample starts, and T at the end          int64 [samples + 1]
    what is to be known of them                         JSON
    size of that JSON, its digest, the file's mark      8, 32 and 8 bytes

The file is mapped, so the system keeps of it in memory what is being read and drops it again. One that was never sealed
has the first part only, no name, and is gone with its process.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from services.trainer.data.samples import Sample, SampleSequence
from smeltkit.errors import DigestMismatch
from smeltkit.manifest import canonical_json
from smeltkit.ml.decoder_targets import IGNORED

MARK: Final = b"smelt-s1"
_TRAILER_BYTES: Final = 8 + 32 + len(MARK)
_PAIR_BYTES: Final = 8
_READ_BYTES: Final = 1 << 20
Starts = npt.NDArray[np.int64]


class StoredSamples(SampleSequence):
    """Samples, in the order in which they were added."""

    def __init__(self, pairs: npt.NDArray[np.int32], starts: Starts, counted: int) -> None:
        """`pairs` of id and target [T, 2], where each sample starts and T at the end, how many targets are learnt."""
        self._pairs, self._starts, self.counted = pairs, starts, counted

    def __len__(self) -> int:
        return len(self._starts) - 1

    def sample(self, number: int) -> Sample:
        """See `SampleSequence`."""
        pairs = self._pairs[self._starts[number] : self._starts[number + 1]]
        return Sample(ids=pairs[:, 0].copy(), targets=pairs[:, 1].copy())

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return int(self._starts[-1])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [int(size) for size in np.diff(self._starts)]


class SampleFile:
    """Takes samples one by one, into an empty file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hasher = file, hashlib.sha256()
        self._starts, self._counted = array("q", [0]), 0

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, sample: Sample) -> None:
        """Writes a sample."""
        data = np.stack([sample.ids, sample.targets], axis=1).astype(np.int32).tobytes()
        self._file.write(data)
        self._hasher.update(data)
        self._starts.append(self._starts[-1] + len(sample.ids))
        self._counted += int((sample.targets != IGNORED).sum())

    def samples(self) -> StoredSamples:
        """All that was added, at least one; nothing can be added any more."""
        self._file.flush()
        pairs = np.memmap(self._file, dtype=np.int32, mode="r", shape=(self._starts[-1], 2))
        return StoredSamples(pairs, np.frombuffer(self._starts, dtype=np.int64), self._counted)

    def seal(self, facts: dict[str, Any]) -> None:
        """Ends the file with `facts` to be known of its samples, none of which need be there."""
        shards = [[self._starts[-1], self._hasher.hexdigest()]]
        _end(
            self._file,
            [np.frombuffer(self._starts, dtype=np.int64)],
            {"counted": self._counted, "shards": shards},
            facts,
        )


def is_sealed(path: Path) -> bool:
    """Whether a file ends as one that was sealed."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(MARK), 0))
        return file.read() == MARK


def open_sealed(path: Path) -> tuple[StoredSamples | None, dict[str, Any]]:
    """The samples of a sealed file, None without any, and what is known of them; DigestMismatch unless every shard is
    what was written."""
    head = _head(path)
    with path.open("rb") as file:
        for number, (tokens, digest) in enumerate(head["shards"]):
            _check(file, tokens * _PAIR_BYTES, digest, f"{path.name}, shard {number} of {len(head['shards'])},")
        _check(file, head["starts"][0] * 8, head["starts"][1], f"{path.name}, index,")
    tokens = sum(size for size, _ in head["shards"])
    if not tokens:
        return None, head["facts"]
    pairs = np.memmap(path, dtype=np.int32, mode="r", shape=(tokens, 2))
    starts = np.memmap(path, dtype=np.int64, mode="r", offset=tokens * _PAIR_BYTES, shape=(head["starts"][0],))
    return StoredSamples(pairs, starts, head["counted"]), head["facts"]


def facts_of(path: Path) -> dict[str, Any]:
    """What is known of the samples of a sealed file."""
    facts: dict[str, Any] = _head(path)["facts"]
    return facts


def join(paths: Iterable[Path], target: Path, facts: dict[str, Any]) -> None:
    """One sealed file of the samples of several in their order, which are removed; their shards stay shards."""
    starts, shards, counted, total = [np.zeros(1, dtype=np.int64)], [], 0, 0
    with target.open("wb") as file:
        for path in paths:
            head = _head(path)
            tokens = sum(size for size, _ in head["shards"])
            with path.open("rb") as part:
                _copy(part, file, tokens * _PAIR_BYTES)
                own = np.frombuffer(part.read(head["starts"][0] * 8), dtype=np.int64)
            starts.append(own[1:] + total)
            shards += head["shards"]
            counted, total = counted + head["counted"], total + tokens
            path.unlink()
        _end(file, starts, {"counted": counted, "shards": shards}, facts)


def _end(file: BinaryIO, starts: Sequence[Starts], head: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes what follows the samples, to the disk itself."""
    index = np.concatenate(starts).tobytes()
    file.write(index)
    told = canonical_json({**head, "starts": [len(index) // 8, hashlib.sha256(index).hexdigest()], "facts": facts})
    file.write(told + len(told).to_bytes(8, "little") + hashlib.sha256(told).digest() + MARK)
    file.flush()
    os.fsync(file.fileno())


def _head(path: Path) -> dict[str, Any]:
    """What follows the samples of a sealed file; DigestMismatch if that is not what was written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _TRAILER_BYTES, 0))
        trailer = file.read()
        told_bytes = int.from_bytes(trailer[:8], "little")
        if trailer[-len(MARK) :] != MARK or told_bytes > size - _TRAILER_BYTES:
            raise DigestMismatch(f"{path.name} is no whole file of samples")
        file.seek(size - _TRAILER_BYTES - told_bytes)
        told = file.read(told_bytes)
    if hashlib.sha256(told).digest() != trailer[8:40]:
        raise DigestMismatch(f"{path.name}, its last part, is not what was written")
    head: dict[str, Any] = json.loads(told)
    return head


def _check(file: BinaryIO, size_bytes: int, digest: str, what: str) -> None:
    hasher = hashlib.sha256()
    for block in _blocks(file, size_bytes):
        hasher.update(block)
    if hasher.hexdigest() != digest:
        raise DigestMismatch(f"{what} is not what was written")


def _copy(source: BinaryIO, target: BinaryIO, size_bytes: int) -> None:
    for block in _blocks(source, size_bytes):
        target.write(block)


def _blocks(file: BinaryIO, size_bytes: int) -> Iterable[bytes]:
    while size_bytes > 0 and (block := file.read(min(_READ_BYTES, size_bytes))):
        size_bytes -= len(block)
        yield block
