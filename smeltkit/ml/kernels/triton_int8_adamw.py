"""AdamW on float32 weights and moments in 8 bits in one pass: a block of 256 is decoded, updated and coded again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.int8 import BLOCK, Coded, book
from smeltkit.ml.kernels.reference import AdamStep

_ROWS = 4
"""Blocks of one program."""


def int8_adamw_(weight: Tensor, grad: Tensor, mean: Coded, square: Coded, step: AdamStep) -> None:
    """As `reference.int8_adamw_`, for contiguous tensors on a CUDA device."""
    blocks = len(mean.scales)
    _update[(triton.cdiv(blocks, _ROWS),)](
        weight, grad, mean.codes, mean.scales, square.codes, square.scales,
        *book(mean.is_signed, weight.device.type), *book(square.is_signed, weight.device.type),
        weight.numel(), blocks, step.beta1, step.beta2, step.eps, 1 - step.learning_rate * step.weight_decay,
        step.learning_rate / (1 - step.beta1**step.count), (1 - step.beta2**step.count) ** -0.5, step.grad_scale,
        ROWS=_ROWS, BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _code(scaled: tl.tensor, middles: tl.tensor) -> tl.tensor:
    """How many of the 255 middles lie below: halving the range eight times."""
    found = (scaled * 0).to(tl.int32)
    for power in tl.static_range(8):
        lower = tl.load(middles + found + ((128 >> power) - 1)) < scaled
        found += tl.where(lower, 128 >> power, 0)
    return found


@triton.jit
def _update(
    weight: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    mean_scales: tl.tensor,
    square: tl.tensor,
    square_scales: tl.tensor,
    mean_book: tl.tensor,
    mean_middles: tl.tensor,
    square_book: tl.tensor,
    square_middles: tl.tensor,
    size: int,
    blocks: int,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    rate: float,
    root_scale: float,
    grad_scale: float,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    held, inside = row < blocks, place < size
    g = tl.load(grad + place, mask=inside, other=0.0) * grad_scale
    w = tl.load(weight + place, mask=inside, other=0.0)
    m_code = tl.load(mean + place, mask=inside, other=0).to(tl.int32)
    v_code = tl.load(square + place, mask=inside, other=0).to(tl.int32)
    m_scale = tl.load(mean_scales + row, mask=held, other=0.0)[:, None]
    v_scale = tl.load(square_scales + row, mask=held, other=0.0)[:, None]
    m = tl.load(mean_book + m_code) * m_scale
    v = tl.load(square_book + v_code) * v_scale
    m = tl.where(inside, m + (g - m) * (1.0 - beta1), 0.0)
    v = tl.where(inside, v * beta2 + (1.0 - beta2) * g * g, 0.0)
    w = w * decay - rate * m / (tl.sqrt(v) * root_scale + eps)
    tl.store(weight + place, w, mask=inside)
    m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
    tl.store(mean_scales + row, m_scale, mask=held)
    tl.store(square_scales + row, v_scale, mask=held)
    m_code = _code(m / tl.maximum(m_scale, 1.1754944e-38)[:, None], mean_middles)
    v_code = _code(v / tl.maximum(v_scale, 1.1754944e-38)[:, None], square_middles)
    tl.store(mean + place, m_code.to(tl.uint8), mask=inside)
    tl.store(square + place, tl.where(v > 0, tl.maximum(v_code, 1), v_code).to(tl.uint8), mask=inside)
