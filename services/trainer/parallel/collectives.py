"""What the processes of a group make together of the tensors that each comes with, as new tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor

_ALL_GATHER: Final[Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Final[Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Named otherwise before torch 2.13."""


def exchanged(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """What `there` makes of x; the gradient of x is what `back` makes of that of the result."""
    return cast(Tensor, _Exchanged.apply(x, there, back))  # type: ignore[no-untyped-call]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        """See `exchanged`."""
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """See `exchanged`."""
        return ctx.back(upstream), None, None


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
