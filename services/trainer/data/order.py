"""Which samples go into which step: one global shuffle an epoch, packed in that order. Nothing but numbers is kept.

The order follows from seed and epoch alone, so a run resumes at any step by computing it again, to the sample. An epoch
is an array of sample numbers and one of where packs begin, at most 12 bytes a sample, and only the newest are kept; a
position is then found by looking it up. Where data files are mixed, an epoch passes as often over each as it shall: a
part of a pass is so many of the file's samples, drawn anew for every epoch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
import numpy.typing as npt

from smeltkit.errors import BadSchedule

_EPOCHS_KEPT: Final = 2
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What an epoch takes of some neighbouring samples."""

    first: int
    """Number of the first of them."""
    count: int
    passes: float = 1.0
    """How often, above 0."""

    def __len__(self) -> int:
        """Samples that an epoch takes."""
        return round(self.passes * self.count)

    def drawn(self, generator: np.random.Generator) -> Numbers:
        """Their numbers, in no order that matters."""
        own = np.arange(self.first, self.first + self.count, dtype=np.int32)
        whole, rest = divmod(len(self), self.count)
        return np.concatenate([*[own] * whole, generator.permutation(own)[:rest] if rest else own[:0]])


class Packs(Sequence[tuple[int, ...]]):
    """The packs of an epoch, each the numbers of its samples, from 0."""

    def __init__(self, numbers: Numbers, starts: npt.NDArray[np.int64], tokens: Sequence[int]) -> None:
        """`numbers` in order, where each pack starts among them with their count at the end, tokens of each pack."""
        self._numbers, self._starts, self.tokens = numbers, starts, tokens

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return tuple(self._numbers[self._starts[index] : self._starts[index + 1]].tolist())


class Order:
    """The order of epochs over samples of known lengths."""

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        pack_tokens: int,
        packs_per_step: int,
        seed: int,
        shares: Sequence[Share] = (),
        first_epoch: int = 0,
    ) -> None:
        """`lengths` in tokens; packs hold at most `pack_tokens`. BadSchedule.

        `shares` say what of the samples an epoch takes, all of them once if empty. Shuffles derive from `seed` and the
        epoch's number in a run in which `first_epoch` others came before.
        """
        self.lengths = lengths if isinstance(lengths, array) else array("i", lengths)
        if not self.lengths or max(self.lengths) > pack_tokens:
            raise BadSchedule(f"samples of {max(self.lengths, default=0)} tokens do not fit {pack_tokens}")
        self._shares = shares or (Share(first=0, count=len(self.lengths)),)
        assert all(map(len, self._shares)), "a share of no sample"
        self._first_epoch = first_epoch
        self._pack_tokens, self._packs_per_step, self._seed = pack_tokens, packs_per_step, seed
        self._newest: dict[int, Packs] = {}
        self._starts = [0]
        """First step of each epoch, as far as any was asked for."""

    def packs(self, epoch: int) -> Packs:
        """Sample numbers of every pack of an epoch, from 0; each sample occurs once."""
        if epoch not in self._newest:
            while len(self._newest) >= _EPOCHS_KEPT:
                self._newest.pop(next(iter(self._newest)))
            self._newest[epoch] = self._packed(epoch)
        return self._newest[epoch]

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may have fewer packs."""
        while len(self._starts) < epoch + 2:
            packs = len(self.packs(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + -(-packs // self._packs_per_step))
        return self._starts[epoch + 1] - self._starts[epoch]

    def steps_in(self, epochs: int) -> int:
        """Optimizer steps of that many epochs."""
        return sum(self.steps(epoch) for epoch in range(epochs))

    def at(self, step: int) -> list[tuple[int, ...]]:
        """The packs of a step, counted from 0 over all epochs."""
        epoch, first = self._place(step)
        return self.packs(epoch)[first : first + self._packs_per_step]

    def tokens_in(self, steps: int) -> int:
        """Tokens that go through the model in that many steps from the first."""
        return sum(sum(tokens) for tokens in self._tokens(steps))

    def fullest(self, steps: int) -> tuple[int, ...]:
        """The first of the packs with the most tokens, over that many steps from the first."""
        found: tuple[int, ...] = ()
        most = 0
        for epoch, tokens in enumerate(self._tokens(steps)):
            if (own := max(tokens)) > most:
                most, found = own, self.packs(epoch)[tokens.index(own)]
        return found

    @property
    def efficiency(self) -> float:
        """Share of the first epoch's places that hold tokens, if every pack were as long as allowed."""
        return sum(self.packs(0).tokens) / (len(self.packs(0)) * self._pack_tokens)

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its first pack there."""
        while self._starts[-1] <= step:
            self.steps(len(self._starts) - 1)
        epoch = bisect_right(self._starts, step) - 1
        return epoch, (step - self._starts[epoch]) * self._packs_per_step

    def _tokens(self, steps: int) -> Iterator[Sequence[int]]:
        """Tokens of every pack of the first steps, epoch by epoch."""
        epoch = 0
        while steps > 0:
            yield self.packs(epoch).tokens[: steps * self._packs_per_step]
            steps, epoch = steps - self.steps(epoch), epoch + 1

    def _packed(self, epoch: int) -> Packs:
        """Next-fit over the shuffled samples: the order of samples is the shuffle itself, whatever fits together."""
        generator = np.random.Generator(np.random.PCG64([self._seed, self._first_epoch + epoch]))
        shuffled = generator.permutation(np.concatenate([share.drawn(generator) for share in self._shares]))
        count = len(shuffled)
        ends = np.concatenate([[0], np.cumsum(np.frombuffer(self.lengths, dtype=np.intc)[shuffled], dtype=np.int64)])
        following = np.searchsorted(ends, ends[:-1] + self._pack_tokens, side="right") - 1
        starts, position = array("q"), 0
        while position < count:
            starts.append(position)
            position = int(following[position])
        places = np.array([*starts, count], dtype=np.int64)
        return Packs(shuffled, places, array("q", np.diff(ends[places]).tolist()))
