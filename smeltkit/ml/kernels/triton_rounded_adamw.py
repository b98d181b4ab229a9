"""AdamW on bf16 weights and moments in one pass: three tensors read and written, the gradient read, nothing beside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.reference import AdamStep

_BLOCK = 1024
_ROUNDS = tl.constexpr(7)  # of Philox: the fewest that pass BigCrush (Salmon et al., 2011)


def rounded_adamw_(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> None:
    """As `reference.rounded_adamw_`, for contiguous tensors on a CUDA device; other random bits from the same seed."""
    size = weight.numel()
    _update[(triton.cdiv(size, _BLOCK),)](
        weight, grad, mean, square, size, step.seed, step.beta1, step.beta2, step.eps,
        1 - step.learning_rate * step.weight_decay, step.learning_rate / (1 - step.beta1**step.count),
        (1 - step.beta2**step.count) ** -0.5, step.grad_scale, BLOCK=_BLOCK,
    )  # fmt: skip


@triton.jit
def _round(exact: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """float32 to bf16, up with the probability that lies below: 16 random bits added to the bits that are cut off."""
    moved = exact.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (moved & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _halves(bits: tl.tensor) -> tl.tensor:
    """Twice as many values, each with 16 of the bits at its lower end: drawing 32 for each takes as long as memory."""
    return tl.interleave(bits, bits >> 16)


@triton.jit
def _update(
    weight: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    size: int,
    seed: int,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    rate: float,
    root_scale: float,
    grad_scale: float,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(mean + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(square + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    w = w * decay - rate * m / (tl.sqrt(v) * root_scale + eps)
    pair = tl.program_id(0).to(tl.int64) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    for_weight, for_mean, for_square, _ = tl.randint4x(seed, pair, n_rounds=_ROUNDS)
    tl.store(weight + place, _round(w, _halves(for_weight)), mask=inside)
    tl.store(mean + place, _round(m, _halves(for_mean)), mask=inside)
    tl.store(square + place, _round(v, _halves(for_square)), mask=inside)
