"""Losses of a block of logits, and their gradient in place of them: each logit is read twice and written once.

One program a row. The first pass keeps a running maximum and the sum of exponentials under it (Milakov and Gimelshein,
arXiv:1805.02867), the second writes softmax - onehot(target).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.kernels.triton_launch import block_of, exact_type

_BLOCK = 8192


def softmax_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `reference.softmax_gradient_`, for tensors on a CUDA device."""
    rows, size = logits.shape
    assert logits.stride(1) == 1, "logits must lie row by row"
    losses = torch.empty(rows, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    block = min(block_of(size), _BLOCK)
    _kernel[(rows,)](
        logits, targets, losses, logits.stride(0),
        SIZE=size, IGNORED=IGNORED, BLOCK=block, EXACT=exact_type(logits), num_warps=16 if block == _BLOCK else 4,
    )  # fmt: skip
    return losses


@triton.jit
def _kernel(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    stride: int,
    SIZE: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    if target == IGNORED:
        for begin in range(0, SIZE, BLOCK):
            zero = tl.zeros((BLOCK,), dtype=EXACT)
            tl.store(start + begin + column, zero, mask=begin + column < SIZE)
        tl.store(losses + row, 0.0)
    else:
        highest = tl.full((BLOCK,), -1e38, dtype=EXACT)
        total = tl.zeros((BLOCK,), dtype=EXACT)
        for begin in range(0, SIZE, BLOCK):
            value = tl.load(start + begin + column, mask=begin + column < SIZE, other=float("-inf")).to(EXACT)
            higher = tl.maximum(highest, value)
            total = total * tl.exp(highest - higher) + tl.exp(value - higher)
            highest = higher
        top = tl.max(highest, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        tl.store(losses + row, log_sum - tl.load(start + target).to(EXACT))
        for begin in range(0, SIZE, BLOCK):
            inside = begin + column < SIZE
            value = tl.load(start + begin + column, mask=inside, other=float("-inf")).to(EXACT)
            found = tl.exp(value - log_sum) - tl.where(begin + column == target, 1.0, 0.0)
            tl.store(start + begin + column, found, mask=inside)
