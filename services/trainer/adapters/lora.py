"""Low-rank adapters on the decoder's linear layers: W x + scale B A x, with W frozen.

Hu et al. (arXiv:2106.09685); the rank-stabilized scale alpha / sqrt(r) is Kalajdzievski's (arXiv:2312.03732). A starts
uniform as torch starts a linear layer, B at zero, so an adapter begins as no change at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.adapters.targets import linear_names
from services.trainer.settings import LoraSettings
from smeltkit.errors import BadConfig, TensorMismatch
from smeltkit.ml.decoder import Decoder


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter. A [r, inputs] and B [outputs, r] are float32, whatever the base is."""

    def __init__(self, base: nn.Linear, config: LoraSettings) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, config.scale, config.dropout
        device = base.weight.device
        self.a = nn.Parameter(torch.empty(config.rank, base.in_features, device=device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs]."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if self.dropout and self.training:
            inner = functional.linear(functional.dropout(x, self.dropout), a)
            return torch.addmm(self.base(x), inner, b.T, alpha=self.scale)
        out: Tensor = _Adapted.apply(x, self.base.weight, self.base.bias, a, b, self.scale)  # type: ignore[no-untyped-call]
        return out

    def delta(self) -> Tensor:
        """scale B A [outputs, inputs] in float32."""
        return self.scale * (self.b.float() @ self.a.float())


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for a frozen W, with both products added where the other's result stands.

    Autograd alone would write the sums of outputs and of gradients by x as tensors of their own, once more through
    memory for each adapter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Keeps x, which the layer's neighbours keep as well, and the [T, r] product."""
        inner = functional.linear(x, a)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return functional.linear(x, weight, bias).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, A and B."""
        x, weight, a, b, inner = ctx.saved_tensors
        by_inner = upstream @ b * ctx.scale
        by_b = upstream.T @ inner * ctx.scale
        by_x = (upstream @ weight).addmm_(by_inner, a) if ctx.needs_input_grad[0] else None
        return by_x, None, None, by_inner.T @ x, by_b, None


def attach(decoder: Decoder, config: LoraSettings) -> list[str]:
    """Puts an adapter on every target of every layer and freezes the rest; the names of what carries one.

    BadConfig names a target that the architecture does not have.
    """
    known = linear_names(decoder.config)
    unknown = [name for name in config.targets if name not in known]
    if unknown:
        raise BadConfig(f"lora.targets: {unknown[0]!r} is no linear layer of this model; it has {', '.join(known)}")
    decoder.requires_grad_(False)
    carriers = []
    for index, layer in enumerate(decoder.layers):
        for name in config.targets or known:
            part, _, leaf = name.partition(".")
            parent = layer.get_submodule(part)
            base = parent.get_submodule(leaf)
            assert isinstance(base, nn.Linear), f"{name} carries an adapter already"
            setattr(parent, leaf, LoraLinear(base, config))
            carriers.append(f"layers.{index}.{name}")
    return carriers


def adapters(decoder: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Canonical name, without `.weight`, and layer of everything that carries an adapter, in forward order."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merged_state(decoder: Decoder) -> dict[str, Tensor]:
    """The canonical weights with every adapter added in: W + scale B A, in float32, rounded to the type of W.

    TensorMismatch unless every adapter changes its layer: an unchanged base is never the result of a merge.
    """
    carriers = dict(adapters(decoder))
    state = {}
    for name, value in decoder.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in carriers:
            continue
        canonical = f"{owner.removesuffix('.base')}.{leaf}"
        state[canonical] = value
        if leaf == "weight" and owner.removesuffix(".base") in carriers:
            changed = (value.float() + carriers[owner.removesuffix(".base")].delta()).to(value.dtype)
            if torch.equal(changed, value):
                raise TensorMismatch(f"the adapter of {canonical} changes nothing; it is untrained or lost in rounding")
            state[canonical] = changed
    if not carriers:
        raise TensorMismatch("the model carries no adapter, so there is nothing to merge")
    return state
