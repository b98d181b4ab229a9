"""What computes: rows of tokens in, logits out. An engine knows slots and positions, never requests or policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(slots=True)
class Rows:
    """One step's work, one entry a row: equally long lists."""

    tokens: list[int] = field(default_factory=list)
    """Token ids."""
    positions: list[int] = field(default_factory=list)
    """Position of each token in its sequence, from 0."""
    slots: list[int] = field(default_factory=list)
    """Slot whose key-value cells the row reads and extends."""
    outputs: list[bool] = field(default_factory=list)
    """Whether the row's logits are wanted."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine is, for results and for admission."""

    name: str
    """Kind of engine, e.g. "llama"."""
    digest: str
    """Digest of code, build and settings that decide the numbers."""
    device: str
    """Device that computes, e.g. "cpu"."""
    vocab_size: int
    """Length of a row of logits."""
    slots: int
    """Sequences that can be held at once."""
    cells: int
    """Tokens of all sequences that the key-value memory holds; a shared prefix counts once."""
    slot_cells: int
    """Tokens of one sequence that it holds at most."""
    batch_rows: int
    """Rows of one step at most."""
    output_rows: int
    """Rows of one step whose logits can be asked for, at most."""
    rows_floor: int
    """Fewest rows above one that are faster together than one after the other; 1 where any are."""


class Engine(Protocol):
    """One loaded model. Not thread-safe: whoever owns it calls it from one thread."""

    info: EngineInfo

    def decode(self, rows: Rows) -> Logits:
        """Computes `rows`; logits (outputs, vocab) float32 of the rows asked for, valid until the next call.

        A row's position must be the number of cells its slot holds. EngineUnavailable if the engine fails.
        """
        ...

    def share(self, source: int, target: int, count: int) -> None:
        """Lets slot `target`, which must be empty, use the first `count` cells of slot `source` as its own."""
        ...

    def cut(self, slot: int, count: int) -> None:
        """Keeps the first `count` cells of `slot` and forgets the rest."""
        ...

    def rest(self) -> None:
        """Called when there is nothing to compute for now: gives back what other engines of the process could use."""
        ...

    def close(self) -> None:
        """Frees all memory; the engine cannot be used afterwards."""
        ...
