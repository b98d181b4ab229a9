"""The processes that share one training: which of them this is, and what they tell each other.

Each holds a part of weights, gradients and optimizer state (`sharding`) and takes its packs of every step, or a part of
each. All of them decide alike, since what a decision rests on is summed over all of them first, and the sum is the same
number for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.parallel.places import Place
from smeltkit import limits
from smeltkit.config import default_environment

T = TypeVar("T")
_LOOPBACK: Final = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where all processes are on this machine, what they say to find each other stays on it."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among `count`, on `device`; without arguments one that works alone."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    tensor: int = 1
    """Processes that compute each layer together, neighbours by rank; they see the same tokens."""
    context: int = 1
    """Such groups, one after the other, that share the tokens of a pack."""
    background: dist.ProcessGroup | None = None
    """All of them once more, for what is told beside the steps."""

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes files and tells of steps."""
        return self.rank == 0

    @property
    def leader(self) -> int:
        """The first of those with the same tokens, who all draw the same random numbers."""
        return self.rank - self.rank % self.tensor

    @property
    def is_teller(self) -> bool:
        """Whether it is the one of those with the same tokens that counts them."""
        return self.rank == self.leader

    @property
    def replicas(self) -> int:
        """Groups of processes that each take packs of their own."""
        return self.count // (self.tensor * self.context)

    @property
    def part(self) -> int:
        """Which of the `context` parts of a pack is this process's."""
        return self.rank // self.tensor % self.context

    def share(self, packs: Sequence[T]) -> Sequence[T]:
        """The packs of a step that this process takes, or takes a part of."""
        return packs[self.rank // (self.tensor * self.context) :: self.replicas]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def totals(self, *numbers: int, device: torch.device | str) -> tuple[int, ...]:
        """Each number, summed over all processes on their devices."""
        if self.count == 1:
            return numbers
        return tuple(self.summed(torch.tensor(numbers, device=device)).tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.totals(int(flag), device=self.device))


ALONE: Final = Ranks()


@contextmanager
def joined(here: Place, device: str, *, meeting: str = "env://") -> Iterator[Ranks]:
    """A process among those of its training, once all have met: where the environment says, as torchrun sets it."""
    if here.count == 1:
        yield ALONE
        return
    if here.is_alone_here:
        default_environment(_LOOPBACK)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=meeting,
        rank=here.rank,
        world_size=here.count,
        timeout=timedelta(seconds=limits.TRAIN_EXCHANGE_TIMEOUT_S),
    )
    try:
        yield Ranks(rank=here.rank, count=here.count, device=device, background=dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
