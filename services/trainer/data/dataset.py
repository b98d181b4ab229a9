"""A data file as samples: read once, row by row, nothing passed over in silence.

The truncation policy is one for training and evaluation: a conversation longer than the sequence is left out and
counted, a text is cut into pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.data.samples import Encoder, Sample
from smeltkit import limits
from smeltkit.errors import BadDataset
from smeltkit.ids import digest_file
from smeltkit.ml.decoder_targets import IGNORED


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples in file order, and what became of every row."""

    digest: str
    """Digest of the file."""
    samples: tuple[Sample, ...]
    rows: int
    """Rows read."""
    too_long: tuple[int, ...]
    """Numbers, from 1, of rows left out because they exceed the sequence."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def counted(self) -> int:
        """Tokens that are learnt in one pass over the data."""
        return sum(sample.counted for sample in self.samples)


def read_dataset(path: Path, encoder: Encoder, sequence_tokens: int, *, text_only: bool = False) -> Dataset:
    """The data set in a JSONL file; BadDataset names the row that is wrong, or says that nothing is left.

    With `text_only` a conversation is a wrong row.
    """
    samples, too_long, number = [], [], 0
    for number, row in _rows(path):
        if text_only and "text" not in row:
            raise BadDataset(f"{path.name} row {number} holds no text; method pretrain takes text rows only")
        sample = encoder.encode(row, f"{path.name} row {number}")
        if len(sample.ids) <= sequence_tokens:
            samples.append(sample)
        elif "text" in row:
            samples += _pieces(sample, sequence_tokens)
        else:
            too_long.append(number)
    if not samples:
        raise BadDataset(f"{path.name}: none of {number} rows fits into {sequence_tokens} tokens")
    with path.open("rb") as file:
        digest, _ = digest_file(file)
    return Dataset(digest=digest, samples=tuple(samples), rows=number, too_long=tuple(too_long))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limits.DATASET_ROW_MAX_BYTES + 1):
            number += 1
            if len(line) > limits.DATASET_ROW_MAX_BYTES or number > limits.DATASET_ROWS_MAX:
                raise BadDataset(
                    f"{path.name} row {number} exceeds {limits.DATASET_ROW_MAX_BYTES} bytes, or the file"
                    f" {limits.DATASET_ROWS_MAX} rows"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadDataset(f"{path.name} row {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise BadDataset(f"{path.name} row {number} is no JSON object")
            yield number, row


def _pieces(sample: Sample, size: int) -> list[Sample]:
    """A text in pieces of at most `size` tokens; each begins with the last token of the one before, to predict from."""
    starts = range(0, len(sample.ids) - 1, size - 1)
    pieces = []
    for start in starts:
        ids, targets = sample.ids[start : start + size], sample.targets[start : start + size].copy()
        targets[-1] = IGNORED
        pieces.append(Sample(ids=ids, targets=np.ascontiguousarray(targets)))
    return [piece for piece in pieces if piece.counted]
