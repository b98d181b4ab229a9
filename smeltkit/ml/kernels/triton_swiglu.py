"""silu(gate) * up in one pass forward and one backward, from gate and up alone: nothing else is kept.

With s = sigmoid(gate): d up = dy gate s, d gate = dy up s (1 + gate (1 - s)).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import exact_type, rows_of

_BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.swiglu`, for tensors on a CUDA device."""
    product: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Keeps its inputs."""
        gate, up = rows_of(gate), rows_of(up)
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        rows, size = gate.shape
        _forward[(rows, triton.cdiv(size, _BLOCK))](
            gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=_BLOCK, EXACT=exact_type(gate)
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by gate and up."""
        gate, up = ctx.saved_tensors
        above = rows_of(upstream)
        by_gate, by_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        rows, size = gate.shape
        _backward[(rows, triton.cdiv(size, _BLOCK))](
            gate, up, above, by_gate, by_up, gate.stride(0), up.stride(0), above.stride(0), size,
            BLOCK=_BLOCK, EXACT=exact_type(gate),
        )  # fmt: skip
        return by_gate, by_up


@triton.jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: int,
    up_stride: int,
    size: int,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    a = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(EXACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(EXACT)
    tl.store(out + row * size + column, a / (1.0 + tl.exp(-a)) * b, mask=inside)


@triton.jit
def _backward(
    gate: tl.tensor,
    up: tl.tensor,
    above: tl.tensor,
    by_gate: tl.tensor,
    by_up: tl.tensor,
    gate_stride: int,
    up_stride: int,
    above_stride: int,
    size: int,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    a = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(EXACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(EXACT)
    outer = tl.load(above + row * above_stride + column, mask=inside, other=0.0).to(EXACT)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    tl.store(by_up + row * size + column, outer * a * sigmoid, mask=inside)
    tl.store(by_gate + row * size + column, outer * b * sigmoid * (1.0 + a * (1.0 - sigmoid)), mask=inside)
