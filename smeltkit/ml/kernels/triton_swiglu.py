"""silu(gate) * up in one pass forward and one backward, from gate and up alone: nothing else is kept."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import exact_type, rows_of
from smeltkit.ml.kernels.triton_swiglu_gradient import BLOCK, launch


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
        _forward[(rows, triton.cdiv(size, BLOCK))](
            gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=BLOCK, EXACT=exact_type(gate)
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by gate and up."""
        gate, up = ctx.saved_tensors
        return launch(gate, up, rows_of(upstream), with_product=False)


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
