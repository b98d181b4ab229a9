"""A data file as samples: read once, row by row, nothing passed over in silence.

The truncation policy is one for training and evaluation: a conversation longer than the sequence is left out and
counted, a text is cut into pieces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from services.trainer.data.infill import Infill
from services.trainer.data.rows import ANY, Row, rows_of
from services.trainer.data.samples import Encoder, Sample
from services.trainer.data.stored import SampleFile, StoredSamples, open_sealed
from services.trainer.settings.columns import ColumnSettings
from smeltkit.errors import BadDataset, UnsupportedOption
from smeltkit.ids import digest_file
from smeltkit.ml.decoder_targets import IGNORED


@dataclass(kw_only=True)
class Tally:
    """What became of rows."""

    rows: int = 0
    """Number of the last row read, from 1; other processes may have read some before it."""
    too_long: list[int] = field(default_factory=list)
    """Numbers of rows left out because they exceed the sequence."""
    texts: int = 0
    """Rows that could have been rearranged for filling in the middle."""
    rearranged: int = 0
    """Rows that were."""

    def add(self, other: Tally) -> None:
        """Takes in that of later rows."""
        self.rows, self.too_long = max(self.rows, other.rows), self.too_long + other.too_long
        self.texts, self.rearranged = self.texts + other.texts, self.rearranged + other.rearranged

    def check(self, samples: int, name: str, sequence_tokens: int, *, with_infill: bool) -> None:
        """Raises where there is nothing to learn, or nothing to rearrange that should be."""
        if not self.rows:
            raise BadDataset(f"{name} holds no row")
        if not samples:
            raise BadDataset(f"{name}: none of {self.rows} rows fits into {sequence_tokens} tokens")
        if with_infill and not self.texts:
            raise UnsupportedOption(f"fim.share has no effect on {name}, which holds no text; remove it")


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

    @classmethod
    def of(cls, samples: StoredSamples, tally: Tally, digest: str) -> Dataset:
        """The samples of a file of that digest, and what became of its rows."""
        return cls(
            digest=digest,
            samples=samples,
            rows=tally.rows,
            too_long=tuple(tally.too_long),
            rearranged=tally.rearranged,
        )

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
    form: str = "rows",
    columns: ColumnSettings = ANY,
    infill: Infill | None = None,
) -> Dataset:
    """The data set in a file, see `rows`; BadDataset names the row that is wrong, or says that nothing is left.

    With `text_only` a conversation is a wrong row. `infill` rearranges texts that fit into a sequence then too; where
    there is no text at all it is refused. The samples lie in a file without a name beside it, gone with the process.
    """
    kept = SampleFile(tempfile.TemporaryFile(dir=path.parent, prefix=".samples-"))  # noqa: SIM115
    rows = rows_of(path, form=form, columns=columns)
    tally = encode_rows(kept, rows, path.name, encoder, sequence_tokens, text_only=text_only, infill=infill)
    tally.check(len(kept), path.name, sequence_tokens, with_infill=infill is not None)
    with path.open("rb") as file:
        digest, _ = digest_file(file)
    return Dataset.of(kept.samples(), tally, digest)


def open_dataset(path: Path) -> Dataset:
    """The data set in a file of samples that was sealed with what `to_facts` gives, the digest of its source among it;
    DigestMismatch unless it is what was written."""
    samples, facts = open_sealed(path)
    assert samples is not None, "a file without samples is no data set"
    return Dataset.of(samples, Tally(**facts["tally"]), facts["digest"])


def encode_rows(
    kept: SampleFile,
    rows: Iterable[Row],
    name: str,
    encoder: Encoder,
    sequence_tokens: int,
    *,
    text_only: bool = False,
    infill: Infill | None = None,
) -> Tally:
    """Adds the samples of rows of the file `name` to `kept`, as `read_dataset` tells; what became of the rows."""
    tally = Tally()
    for number, row, sample in encoder.encode_all(_texts(rows, name) if text_only else rows, name):
        tally.rows = number
        if infill is not None and "text" in row:
            where = f"{name} row {number}"
            tally.texts += 1
            ids = infill.ids(row["text"], number, where)
            moved = encoder.text(ids, where) if ids else sample
            if moved is not sample and len(moved.ids) <= sequence_tokens:
                sample, tally.rearranged = moved, tally.rearranged + 1
        if len(sample.ids) <= sequence_tokens:
            kept.add(sample)
        elif "messages" not in row:
            for piece in _pieces(sample, sequence_tokens):
                kept.add(piece)
        else:
            tally.too_long.append(number)
    return tally


def to_facts(tally: Tally, **more: Any) -> dict[str, Any]:
    """A tally as what is kept beside samples in a file."""
    return {"tally": asdict(tally), **more}


def _texts(rows: Iterable[Row], name: str) -> Iterator[Row]:
    """The rows; BadDataset for one that is a conversation."""
    for number, row in rows:
        if "messages" in row and "text" not in row:
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
