"""What the processes of a group make together of the tensors that each comes with, as new tensors."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

_ALL_GATHER: Final[Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Final[Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Named otherwise before torch 2.13."""


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All of them, one after the other: [processes * n, ...] of each one's [n, ...]."""
    found = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _ALL_GATHER(found, x.contiguous(), group=group)
    return found


def scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This process's rows of the sum of all: [n, ...] of each one's [processes * n, ...]."""
    found = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    _REDUCE_SCATTER(found, x.contiguous(), group=group)
    return found
