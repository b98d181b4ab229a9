"""Rotary positions in one pass; the backward pass is the same rotation the other way round."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import block_of, exact_type


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotate`, for tensors on a CUDA device; cos and sin take no gradient."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keeps the angles alone."""
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The transpose of a rotation is its inverse."""
        cos, sin = ctx.saved_tensors
        return _launch(upstream, cos, sin, -1.0), None, None


def _launch(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    tokens, heads, size = x.shape
    half = cos.shape[-1]
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    _kernel[(tokens,)](
        x, cos, sin, out, x.stride(0), x.stride(1), heads, half, size - 2 * half, sign,
        HEADS=block_of(heads), HALF=block_of(half), REST=block_of(max(size - 2 * half, 1)), EXACT=exact_type(x),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    token_stride: int,
    head_stride: int,
    heads: int,
    half: int,
    rest: int,
    sign: float,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head, index = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (index < half)
    c = tl.load(cos + token * half + index, mask=index < half, other=0.0).to(EXACT)
    s = tl.load(sin + token * half + index, mask=index < half, other=0.0).to(EXACT) * sign
    source = x + token * token_stride + head * head_stride
    target = out + (token * heads + head) * (2 * half + rest)
    first = tl.load(source + index, mask=inside, other=0.0).to(EXACT)
    second = tl.load(source + half + index, mask=inside, other=0.0).to(EXACT)
    tl.store(target + index, first * c - second * s, mask=inside)
    tl.store(target + half + index, second * c + first * s, mask=inside)
    if rest > 0:
        beyond = 2 * half + tl.arange(0, REST)[None, :]
        kept = (head < heads) & (beyond < 2 * half + rest)
        tl.store(target + beyond, tl.load(source + beyond, mask=kept), mask=kept)
