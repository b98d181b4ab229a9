"""Held-out measurements of a run as they lie on disk.

FOLDER/heldout.jsonl     a line a measurement: step, tokens seen, loss of each sample in nats a token
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

HELDOUT_FILE: Final = "heldout.jsonl"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens seen."""
    losses: tuple[float, ...]
    """Of each held-out sample."""

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return fmean(self.losses)


def read_course(path: Path) -> list[Measured]:
    """The measurements in a file, in order; none where there is no file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Measured(**{**value, "losses": tuple(value["losses"])}) for value in map(json.loads, lines)]


def write_course(path: Path, measured: Iterable[Measured]) -> None:
    """Writes measurements to a file in place of what it held, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text("".join(json.dumps(asdict(one)) + "\n" for one in measured))
    fresh.replace(path)
