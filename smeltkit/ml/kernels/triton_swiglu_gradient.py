"""The backward pass of silu(gate) * up, with or without the product itself in place of the gradient that comes in.

With s = sigmoid(gate): d up = dy gate s, d gate = dy up s (1 + gate (1 - s)).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.kernels.triton_launch import exact_type, rows_of

BLOCK = 1024


def swiglu_gradient_(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.swiglu_gradient_`, for tensors on a CUDA device; the product is what `swiglu` gives, to the bit."""
    assert upstream.stride(1) == 1, "the gradient must lie row by row"
    return launch(rows_of(gate), rows_of(up), upstream, with_product=True)


def launch(gate: Tensor, up: Tensor, upstream: Tensor, *, with_product: bool) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up, of rows whose values lie side by side; upstream becomes the product if wanted."""
    by_gate, by_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    rows, size = gate.shape
    _backward[(rows, triton.cdiv(size, BLOCK))](
        gate, up, upstream, by_gate, by_up, gate.stride(0), up.stride(0), upstream.stride(0), size,
        BLOCK=BLOCK, EXACT=exact_type(gate), WITH_PRODUCT=with_product,
    )  # fmt: skip
    return by_gate, by_up


@triton.jit
def _backward(
    gate: tl.tensor,
    up: tl.tensor,
    upstream: tl.tensor,
    by_gate: tl.tensor,
    by_up: tl.tensor,
    gate_stride: int,
    up_stride: int,
    above_stride: int,
    size: int,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    above = upstream + row * above_stride + column
    a = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(EXACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(EXACT)
    outer = tl.load(above, mask=inside, other=0.0).to(EXACT)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    tl.store(by_up + row * size + column, outer * a * sigmoid, mask=inside)
    tl.store(by_gate + row * size + column, outer * b * sigmoid * (1.0 + a * (1.0 - sigmoid)), mask=inside)
    if WITH_PRODUCT:
        tl.store(above, a / (1.0 + tl.exp(-a)) * b, mask=inside)
