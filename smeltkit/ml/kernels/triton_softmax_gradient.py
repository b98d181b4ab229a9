"""Losses of a block of logits, and their gradient in place of them: each logit is read twice and written once.

One program a row. The first pass keeps running maxima and the sums of exponentials under them (Milakov and Gimelshein,
arXiv:1805.02867), one of each for a few neighbours; the second writes softmax - onehot(target), last values first, of
which the cache still has the most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.kernels.triton_launch import block_of, exact_type

_BLOCK, _NEIGHBOURS = 8192, 8
"""Values that a program takes at a time, and those of them that share a maximum: what a thread reads at once."""


def softmax_gradient_(logits: Tensor, targets: Tensor, divisor: int = 1) -> Tensor:
    """As `reference.softmax_gradient_`, for tensors on a CUDA device."""
    rows, size = logits.shape
    assert logits.stride(1) == 1, "logits must lie row by row"
    losses = torch.empty(rows, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    block = max(min(block_of(size), _BLOCK), _NEIGHBOURS)
    _kernel[(rows,)](
        logits, targets, losses, logits.stride(0), divisor,
        SIZE=size, IGNORED=IGNORED, GROUPS=block // _NEIGHBOURS, NEIGHBOURS=_NEIGHBOURS, EXACT=exact_type(logits),
        num_warps=32 if block == _BLOCK else 4,
    )  # fmt: skip
    return losses


@triton.jit(do_not_specialize=["divisor"])
def _kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: int,
    divisor: int,
    SIZE: tl.constexpr,
    IGNORED: tl.constexpr,
    GROUPS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    BLOCK: tl.constexpr = GROUPS * NEIGHBOURS
    COUNT: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    column = tl.arange(0, GROUPS)[:, None] * NEIGHBOURS + tl.arange(0, NEIGHBOURS)[None, :]
    if target == IGNORED:
        for number in range(COUNT):
            place = number * BLOCK + column
            tl.store(start + place, tl.zeros((GROUPS, NEIGHBOURS), dtype=EXACT), mask=place < SIZE)
        tl.store(losses + row, 0.0)
    else:
        highest = tl.full((GROUPS,), -1e38, dtype=EXACT)
        total = tl.zeros((GROUPS,), dtype=EXACT)
        for number in range(COUNT):
            place = number * BLOCK + column
            value = tl.load(start + place, mask=place < SIZE, other=float("-inf")).to(EXACT)
            higher = tl.maximum(highest, tl.max(value, 1))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher[:, None]), 1)
            highest = higher
        top = tl.max(highest, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        tl.store(losses + row, log_sum - tl.load(start + target).to(EXACT))
        share = 1.0 / tl.full((1, 1), divisor, dtype=EXACT)
        for number in range(COUNT):
            place = (COUNT - 1 - number) * BLOCK + column
            inside = place < SIZE
            value = tl.load(start + place, mask=inside, other=float("-inf")).to(EXACT)
            found = tl.exp(value - log_sum) - tl.where(place == target, 1.0, 0.0)
            tl.store(start + place, found * share, mask=inside)
