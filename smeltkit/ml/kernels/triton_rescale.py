"""A tensor times a scalar that lies on its device; a factor of 1, which is the rule, costs a launch and no more."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import exact_type

_BLOCK, _PROGRAMS_MAX = 4096, 1024


def rescale_(values: Tensor, factor: Tensor) -> None:
    """As `reference.rescale_`, for contiguous tensors on a CUDA device; nobody waits for the factor."""
    size = values.numel()
    programs = min(triton.cdiv(size, _BLOCK), _PROGRAMS_MAX)
    _kernel[(programs,)](values, factor, size, programs, BLOCK=_BLOCK, EXACT=exact_type(values))


@triton.jit
def _kernel(
    values: tl.tensor, factor: tl.tensor, size: int, programs: int, BLOCK: tl.constexpr, EXACT: tl.constexpr
) -> None:
    scale, first = tl.load(factor).to(EXACT), tl.program_id(0).to(tl.int64)
    if scale != 1.0:
        for turn in range(tl.cdiv(size, BLOCK * programs)):
            place = (first + turn * programs) * BLOCK + tl.arange(0, BLOCK)
            inside = place < size
            tl.store(values + place, tl.load(values + place, mask=inside, other=0.0).to(EXACT) * scale, mask=inside)
