"""The order of a whole run: that of each of its stages, one after the other.

Samples have one number, whichever stage takes them: they are those of all data files, end to end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from services.trainer.data.order import Order
from services.trainer.data.samples import Sample, SampleSequence


class Curriculum:
    """The steps of a run of several stages, or of one."""

    def __init__(self, stages: Sequence[tuple[Order, int]]) -> None:
        """The order of each stage over the samples of all, and how many steps of it are done, at least one."""
        self._stages = stages
        self.starts = (0, *accumulate(steps for _, steps in stages))
        """First step of each stage, from 0, and the number of all."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        return self._stages[0][0].lengths

    def stage(self, step: int) -> int:
        """The stage of a step, both from 0; the last one for steps beyond the end."""
        return min(bisect_right(self.starts, step), len(self._stages)) - 1

    def enters(self, step: int) -> bool:
        """Whether a step is the first of a stage that follows upon another."""
        return step in self.starts[1:-1]

    def at(self, step: int) -> list[tuple[int, ...]]:
        """The packs of a step, from 0, each the numbers of its samples."""
        stage = self.stage(step)
        return self._stages[stage][0].at(step - self.starts[stage])

    def tokens_in(self, steps: int) -> int:
        """Tokens that go through the model in that many steps from the first."""
        begun = zip(self._stages, self.starts, strict=False)
        return sum(order.tokens_in(max(min(steps - start, own), 0)) for (order, own), start in begun)

    @property
    def efficiency(self) -> tuple[float, ...]:
        """Share of the places of each stage's packs that hold tokens, see `Order`."""
        return tuple(order.efficiency for order, _ in self._stages)

    def fullest(self) -> tuple[int, ...]:
        """The first of the packs with the most tokens."""
        found = (order.fullest(steps) for order, steps in self._stages)
        return max(found, key=lambda pack: sum(self.lengths[number] for number in pack))


class Joined(SampleSequence):
    """The samples of several data files, end to end."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts
        self.firsts = (0, *accumulate(map(len, parts)))
        """Number of the first sample of each, and how many there are."""

    def __len__(self) -> int:
        return self.firsts[-1]

    def sample(self, number: int) -> Sample:
        """See `SampleSequence`."""
        part = bisect_right(self.firsts, number) - 1
        return self._parts[part][number - self.firsts[part]]
