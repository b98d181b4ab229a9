"""RMSNorm in one pass forward and one backward.

y = x r w with r = (mean(x^2) + eps)^-1/2. With g = dy w and n = x r: dx = r (g - n mean(g n)), dw = sum over rows of
dy n. Each program keeps the share of dw that its rows make in registers; the shares are added afterwards, in a fixed
order, so the result does not change from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import block_of, exact_type, rows_of, warps_of

_ROWS, _ROWS_FROZEN = 32, 2
"""Rows of one program of the backward pass, with a share of the weight's gradient to keep and without."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, for tensors on a CUDA device."""
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps x and the reciprocal root mean square of each row."""
        rows = rows_of(x)
        count, size = rows.shape
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        exact = torch.promote_types(x.dtype, torch.float32)
        scales = torch.empty(count, dtype=exact, device=x.device)
        block = block_of(size)
        _forward[(count,)](
            rows, weight, out, scales, rows.stride(0), size, eps,
            BLOCK=block, EXACT=exact_type(x), num_warps=warps_of(block),
        )  # fmt: skip
        ctx.save_for_backward(rows, weight, scales)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x and, unless it is frozen, by weight."""
        rows, weight, scales = ctx.saved_tensors
        count, size = rows.shape
        above = rows_of(upstream)
        by_x = torch.empty_like(rows, memory_format=torch.contiguous_format)
        has_weight = ctx.needs_input_grad[1]
        per_program = _ROWS if has_weight else _ROWS_FROZEN
        grid = triton.cdiv(count, per_program)
        shares = torch.empty((grid, size) if has_weight else 0, dtype=scales.dtype, device=rows.device)
        block = block_of(size)
        _backward[(grid,)](
            rows, weight, scales, above, by_x, shares, rows.stride(0), above.stride(0), count, size,
            ROWS=per_program, BLOCK=block, EXACT=exact_type(rows), WITH_WEIGHT=has_weight,
            num_warps=warps_of(block),
        )  # fmt: skip
        by_weight = shares.sum(0).to(weight.dtype) if has_weight else None
        return by_x.view(upstream.shape), by_weight, None


@triton.jit
def _forward(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    stride: int,
    size: int,
    eps: float,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    stored = tl.load(x + row * stride + column, mask=inside, other=0.0)
    value = stored.to(EXACT)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(scales + row, scale)
    normed = (value * scale).to(stored.dtype)
    tl.store(out + row * size + column, normed * tl.load(weight + column, mask=inside, other=0.0), mask=inside)


@triton.jit
def _backward(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    above: tl.tensor,
    by_x: tl.tensor,
    shares: tl.tensor,
    stride: int,
    above_stride: int,
    count: int,
    size: int,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    inside = column < size
    factor = tl.load(weight + column, mask=inside, other=0.0).to(EXACT)
    share = tl.zeros((BLOCK,), dtype=EXACT)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        held = inside & (row < count)
        scale = tl.load(scales + row, mask=row < count, other=0.0)
        normed = tl.load(x + row * stride + column, mask=held, other=0.0).to(EXACT) * scale
        outer = tl.load(above + row * above_stride + column, mask=held, other=0.0).to(EXACT)
        inner = outer * factor
        found = scale * (inner - normed * (tl.sum(inner * normed, 0) / size))
        tl.store(by_x + row * size + column, found, mask=held)
        if WITH_WEIGHT:
            share += outer * normed
    if WITH_WEIGHT:
        tl.store(shares + tl.program_id(0) * size + column, share, mask=inside)
