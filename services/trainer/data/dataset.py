"""A data file as samples: read once, row by row, nothing passed over in silence.

The truncation policy is one for training and evaluation: a conversation longer than the sequence is left out and
counted, a text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.trainer.data.infill import Infill
from services.trainer.data.rows import Row, rows_of
from services.trainer.data.samples import Encoder, Sample
from services.trainer.data.stored import SampleFile, StoredSamples
from smeltkit.errors import BadDataset, UnsupportedOption
from smeltkit.ids import digest_file
from smeltkit.ml.decoder_targets import IGNORED


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples in file order, and what became of every row."""

    digest: str
    """Digest of the file."""
    samples: StoredSamples
    rows: int
    """Rows read."""
    too_long: tuple[int, ...]
    """Numbers, from 1, of rows left out because they exceed the sequence."""
    rearranged: int
    """Rows rearranged for filling in the middle."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.samples.tokens

    @property
    def counted(self) -> int:
        """Tokens that are learnt in one pass over the data."""
        return self.samples.counted


def read_dataset(
    path: Path,
    encoder: Encoder,
    sequence_tokens: int,
    *,
    text_only: bool = False,
    is_text: bool = False,
    infill: Infill | None = None,
) -> Dataset:
    """The data set in a file, see `rows`; BadDataset names the row that is wrong, or says that nothing is left.

    With `text_only` a conversation is a wrong row. `infill` rearranges texts that fit into a sequence then too; where
    there is no text at all it is refused.
    """
    kept, too_long, number, texts, rearranged = SampleFile(path.parent), [], 0, 0, 0
    rows = rows_of(path, is_text=is_text)
    for number, row, sample in encoder.encode_all(_texts(rows, path.name) if text_only else rows, path.name):
        if infill is not None and "text" in row:
            where = f"{path.name} row {number}"
            texts += 1
            ids = infill.ids(row["text"], number, where)
            moved = encoder.text(ids, where) if ids else sample
            if moved is not sample and len(moved.ids) <= sequence_tokens:
                sample, rearranged = moved, rearranged + 1
        if len(sample.ids) <= sequence_tokens:
            kept.add(sample)
        elif "messages" not in row:
            for piece in _pieces(sample, sequence_tokens):
                kept.add(piece)
        else:
            too_long.append(number)
    if not len(kept):
        raise BadDataset(f"{path.name}: none of {number} rows fits into {sequence_tokens} tokens")
    if infill is not None and not texts:
        raise UnsupportedOption(f"fim.share has no effect on {path.name}, which holds no text; remove it")
    with path.open("rb") as file:
        digest, _ = digest_file(file)
    return Dataset(digest=digest, samples=kept.samples(), rows=number, too_long=tuple(too_long), rearranged=rearranged)


def _texts(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows; BadDataset for one that is a conversation."""
    for number, row in rows:
        if "messages" in row:
            raise BadDataset(f"{name} row {number} holds no text; method pretrain takes text rows only")
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
