"""The decoder's hot operations, each as a torch reference and, on CUDA, as a Triton kernel of the same signature.

`Kernels` is what the decoder is given; nothing else knows which implementation runs. The Triton half is loaded by name,
because Triton comes with torch's CUDA builds only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from smeltkit.ml.int8 import Coded
from smeltkit.ml.kernels import reference
from smeltkit.ml.nf4 import Nf4


class Dequantize(Protocol):
    """Quantized tensor and float type to its values, written to `out` if given, which may have any strides."""

    def __call__(self, weight: Nf4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor: ...


class SoftmaxGradient(Protocol):
    """Logits [C, V] and targets [C] to losses [C] in float32 at least.

    The logits become the gradient of the summed loss over `divisor`.
    """

    def __call__(self, logits: Tensor, targets: Tensor, divisor: int = 1) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """One implementation of every operation. T is tokens, H hidden, heads and widths as the config says."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [..., H], weight [H], eps) to x / rms(x) * weight, computed in float32 at least, in the type of x."""
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x [T, heads, D], cos [T, R / 2], sin [T, R / 2]) to x with its first R of D dimensions rotated by halves."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) to silu(gate) * up."""
    swiglu_gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(gate, up, upstream), rows [N, I], to the gradients by gate and up; upstream becomes swiglu(gate, up)."""
    softmax_gradient: SoftmaxGradient
    rescale: Callable[[Tensor, Tensor], None]
    """(values, scalar on their device): multiplied in place; where the scalar is 1, nothing is read on a GPU."""
    dequantize_nf4: Dequantize
    """Equal to the last bit everywhere."""
    int8_adamw: Callable[[Tensor, Tensor, Coded, Coded, reference.AdamStep], None]
    """(weight [n], gradient [n], both float32, mean, mean of squares) updated in place."""
    rounded_adamw: Callable[[Tensor, Tensor, Tensor, Tensor, reference.AdamStep], None]
    """(weight, gradient, mean, mean of squares; all of them bf16) updated in place, rounded stochastically."""


REFERENCE = Kernels(
    rms_norm=reference.rms_norm,
    rotate=reference.rotate,
    swiglu=reference.swiglu,
    swiglu_gradient=reference.swiglu_gradient_,
    softmax_gradient=reference.softmax_gradient_,
    rescale=reference.rescale_,
    dequantize_nf4=reference.dequantize_nf4,
    int8_adamw=reference.int8_adamw_,
    rounded_adamw=reference.rounded_adamw_,
)
"""Plain torch: any device, any float type, differentiable to any order but the last six."""


def kernels_for(device_type: str) -> Kernels:
    """The fastest implementation for tensors on a device such as `cuda` or `cpu`."""
    return triton_kernels() if device_type == "cuda" else REFERENCE


def triton_kernels() -> Kernels:
    """The Triton implementation; ImportError where Triton is not installed."""
    found: dict[str, Any] = {}
    for field in fields(Kernels):
        module = importlib.import_module(f"smeltkit.ml.kernels.triton_{field.name}")
        found[field.name] = getattr(module, field.name, None) or getattr(module, f"{field.name}_")
    return Kernels(**found)
