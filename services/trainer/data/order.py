"""Which samples go into which step: one global shuffle an epoch, packed in that order. Nothing but numbers is kept.

The order follows from seed and epoch alone, so a run resumes at any step by computing it again, to the sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from smeltkit.errors import BadSchedule

Packs = Sequence[tuple[int, ...]]
"""Sample numbers of packs."""
_EPOCHS_KEPT: Final = 4


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a whole run over samples of known lengths."""

    lengths: tuple[int, ...]
    """Tokens of each sample."""
    pack_tokens: int
    """Tokens that a pack may hold."""
    packs_per_step: int
    """Packs of one optimizer step."""
    seed: int
    """What the shuffles derive from."""
    _newest: dict[int, Packs] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Packs of the epochs asked for last."""
    _starts: list[int] = field(default_factory=lambda: [0], init=False, compare=False, repr=False)
    """First step of each epoch, as far as any was asked for."""

    def __post_init__(self) -> None:
        if not self.lengths or max(self.lengths) > self.pack_tokens:
            raise BadSchedule(f"samples of {max(self.lengths, default=0)} tokens do not fit {self.pack_tokens}")

    def packs(self, epoch: int) -> Packs:
        """Sample numbers of every pack of an epoch, from 0; each sample occurs once."""
        if epoch not in self._newest:
            while len(self._newest) >= _EPOCHS_KEPT:
                self._newest.pop(next(iter(self._newest)))
            self._newest[epoch] = _packed(self, epoch)
        return self._newest[epoch]

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may have fewer packs."""
        return -(-len(self.packs(epoch)) // self.packs_per_step)

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps of that many epochs."""
        return sum(self.steps(epoch) for epoch in range(epochs))

    def at(self, step: int) -> list[tuple[int, ...]]:
        """The packs of a step, counted from 0 over all epochs."""
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps(len(self._starts) - 1))
        epoch = bisect_right(self._starts, step) - 1
        first = (step - self._starts[epoch]) * self.packs_per_step
        return list(self.packs(epoch)[first : first + self.packs_per_step])

    def tokens_in(self, steps: int) -> int:
        """Tokens that go through the model in that many steps from the first."""
        tokens, epoch = 0, 0
        while steps > 0:
            packs = self.packs(epoch)[: steps * self.packs_per_step]
            tokens += sum(self.lengths[number] for pack in packs for number in pack)
            steps, epoch = steps - self.steps(epoch), epoch + 1
        return tokens

    @property
    def efficiency(self) -> float:
        """Share of the first epoch's places that hold tokens, if every pack were as long as allowed."""
        return sum(self.lengths) / (len(self.packs(0)) * self.pack_tokens)


def _packed(order: Order, epoch: int) -> Packs:
    """Next-fit over the shuffled samples: the order of samples is the shuffle itself, whatever fits together."""
    shuffled = np.random.Generator(np.random.PCG64([order.seed, epoch])).permutation(len(order.lengths))
    packs: list[tuple[int, ...]] = []
    held: list[int] = []
    room = order.pack_tokens
    for number in shuffled.tolist():
        if order.lengths[number] > room:
            packs.append(tuple(held))
            held, room = [], order.pack_tokens
        held.append(number)
        room -= order.lengths[number]
    return (*packs, tuple(held))
