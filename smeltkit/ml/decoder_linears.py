"""Linear layers together with what is around them, so that less is kept and less is added up.

Autograd alone keeps the input of each layer, and writes the gradient by an input that layers share once for each layer
and once more for each sum. What plain layers with weights to train do here, layers of other kinds may do in `together`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smeltkit.ml.kernels import Kernels


def side_by_side(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of layers that share the input x [T, inputs], in one go where they can."""
    together = getattr(layers[0], "together", None)
    if together:
        outs: tuple[Tensor, ...] = together(x, layers)
        return outs
    if not all(_is_plain(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    outs = _SideBySide.apply(x, len(layers), *weights, *biases)  # type: ignore[no-untyped-call]
    return outs


def gated(gate: Tensor, up: Tensor, down: nn.Module, kernels: Kernels) -> Tensor:
    """`down` of silu(gate) * up, both [T, inner]. A plain layer's input is made again with the gradients, not kept."""
    if not _is_plain(down):
        out: Tensor = down(kernels.swiglu(gate, up))
        return out
    out = _Gated.apply(gate, up, down.weight, down.bias, kernels)  # type: ignore[no-untyped-call]
    return out


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a product, and learns."""
    return isinstance(layer, nn.Linear) and layer.weight.requires_grad and torch.is_grad_enabled()


class _SideBySide(torch.autograd.Function):
    """x W^T + bias for each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """`parameters` are every weight and then every bias or None."""
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        return tuple(functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True) if w is not None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, in one sum that grows, and by every weight and bias."""
        x, *weights = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = upstreams[0] @ weights[0]
            for upstream, weight in zip(upstreams[1:], weights[1:], strict=True):
                by_x.addmm_(upstream, weight)
        return by_x, None, *_by_parameters(upstreams, x, ctx.needs_input_grad[2:])


class _Gated(torch.autograd.Function):
    """(silu(gate) * up) W^T + bias."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        """Keeps gate and up alone."""
        ctx.save_for_backward(gate, up, weight)
        ctx.kernels = kernels
        return functional.linear(kernels.swiglu(gate, up), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by gate, up, weight and bias; the product is written over what it is no longer needed for."""
        gate, up, weight = ctx.saved_tensors
        product = upstream @ weight
        by_gate, by_up = ctx.kernels.swiglu_gradient(gate, up, product)
        return by_gate, by_up, *_by_parameters((upstream,), product, ctx.needs_input_grad[2:4]), None


def _by_parameters(upstreams: Sequence[Tensor], x: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients by every weight and then every bias of layers with the input x; None for what is not wanted."""
    by_weights = [each.T @ x if is_wanted else None for each, is_wanted in zip(upstreams, wanted, strict=False)]
    biases = wanted[len(upstreams) :]
    return [
        *by_weights,
        *(each.sum(0) if is_wanted else None for each, is_wanted in zip(upstreams, biases, strict=True)),
    ]
