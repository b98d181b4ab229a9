"""Samples in a file: what a process holds of a data set does not grow with it, except for where each sample begins.

The file has no name, lies beside the data, and is gone with the process. Ids and targets of all samples stand in it end
to end and are mapped, so the system keeps of them in memory what is being read and drops it again.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from services.trainer.data.samples import Sample
from smeltkit.ml.decoder_targets import IGNORED


class StoredSamples(Sequence[Sample]):
    """Samples, in the order in which they were added; 8 bytes each in memory."""

    def __init__(self, pairs: npt.NDArray[np.int32], starts: array[int], counted: int) -> None:
        """`pairs` of id and target [T, 2], where each sample starts and T at the end, how many targets are learnt."""
        self._pairs, self._starts, self.counted = pairs, starts, counted

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        pairs = self._pairs[self._starts[index] : self._starts[index + 1]]
        return Sample(ids=pairs[:, 0].copy(), targets=pairs[:, 1].copy())

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self._starts[-1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [int(size) for size in np.diff(np.frombuffer(self._starts, dtype=np.int64))]


class SampleFile:
    """Takes samples one by one."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".samples-")  # noqa: SIM115
        self._starts, self._counted = array("q", [0]), 0

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, sample: Sample) -> None:
        """Writes a sample."""
        self._file.write(np.stack([sample.ids, sample.targets], axis=1).astype(np.int32).tobytes())
        self._starts.append(self._starts[-1] + len(sample.ids))
        self._counted += int((sample.targets != IGNORED).sum())

    def samples(self) -> StoredSamples:
        """All that was added, at least one; nothing can be added any more."""
        self._file.flush()
        pairs = np.memmap(self._file, dtype=np.int32, mode="r", shape=(self._starts[-1], 2))
        return StoredSamples(pairs, self._starts, self._counted)
