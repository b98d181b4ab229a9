"""Low-rank adapters on the decoder's linear layers: W x + scale B A x, with W frozen, in floats or in NF4.

Hu et al. (arXiv:2106.09685); the rank-stabilized scale alpha / sqrt(r) is Kalajdzievski's (arXiv:2312.03732). A starts
uniform as torch starts a linear layer, B at zero, so an adapter begins as no change at all. DoRA (Liu et al.,
arXiv:2402.09353) also learns the length m of each row: m / |W + scale B A| times the sum, the divisor as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.adapters.targets import linear_names
from services.trainer.settings import LoraSettings
from smeltkit.errors import BadConfig, TensorMismatch
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import Nf4Linear

_WIDE: Final = 2
"""Quotient of a layer's widths from which its wider side is made in one product."""
Frozen = nn.Linear | Nf4Linear
"""What an adapter can be put on: `weight`, for NF4 made anew whenever it is asked for, and `bias`."""


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: A [r, inputs], B [outputs, r] and, of DoRA, the magnitudes m [outputs].

    They are float32, whatever the base is.
    """

    base_squares: Tensor

    def __init__(self, base: Frozen, config: LoraSettings) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, config.scale, config.dropout
        weight = base.weight.detach()
        self.a = nn.Parameter(torch.empty(config.rank, base.in_features, device=weight.device, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=weight.device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.magnitude: nn.Parameter | None = None
        if config.dora:
            self.register_buffer("base_squares", weight.float().square().sum(1), persistent=False)
            self.magnitude = nn.Parameter(self.base_squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs]."""
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        is_dropping = self.dropout > 0 and self.training
        kept = functional.dropout(x, self.dropout) if is_dropping else x
        if self.magnitude is None and is_dropping:
            return torch.addmm(self.base(x), functional.linear(kept, a), b.T, alpha=self.scale)
        bias = self.base.bias if self.magnitude is None else None
        out: Tensor = _Adapted.apply(kept, self.base, bias, a, b, self.scale)  # type: ignore[no-untyped-call]
        if self.magnitude is None:
            return out
        rest = self.base(x - kept) if is_dropping else self.base.bias
        # Half precision holds a gain less 1 far better than a gain near 1.
        return torch.addcmul(out if rest is None else out + rest, out, (self._gain(self.magnitude) - 1).to(x.dtype))

    def merged(self) -> Tensor:
        """The one weight [outputs, inputs] in float32 that computes the same without an adapter."""
        total = self.base.weight.float() + self.scale * (self.b.float() @ self.a.float())
        return total if self.magnitude is None else total * self._gain(self.magnitude)[:, None]

    def _gain(self, magnitude: Tensor) -> Tensor:
        """m / |W + scale B A| of each row [outputs]; the norm by the parts of its square, without the sum itself."""
        with torch.no_grad():
            weight = self.base.weight
            cross = (weight @ self.a.T.to(weight.dtype)).to(self.b.dtype)
            outer = self.b @ (self.a @ self.a.T)
            square = self.base_squares + (self.b * (2 * self.scale * cross + self.scale**2 * outer)).sum(1)
        return magnitude * torch.rsqrt(square.clamp(min=1e-30))


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for a frozen W, with both products added where the other's result stands.

    Autograd alone would write the sums of outputs and of gradients by x as tensors of their own, once more through
    memory for each adapter. Where the result is much wider than what it is made of, even adding in place costs more
    than one product of longer rows, [x | x A^T] [W | scale B]^T, with the copy of both that this takes. W is asked for
    again in the backward pass, so that one in NF4 is never kept dequantized.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Frozen, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Keeps x, which the layer's neighbours keep as well, and the [T, r] product."""
        inner = functional.linear(x, a)
        ctx.save_for_backward(x, a, b, inner)
        ctx.base, ctx.scale = base, scale
        if base.out_features >= _WIDE * base.in_features:
            return functional.linear(torch.cat((x, inner), 1), _beside(base, b * scale), bias)
        return functional.linear(x, base.weight, bias).addmm_(inner, b.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, A and B."""
        x, a, b, inner = ctx.saved_tensors
        by_inner = upstream @ b * ctx.scale
        by_b = upstream.T @ inner * ctx.scale
        by_x = None
        if ctx.needs_input_grad[0] and ctx.base.in_features >= _WIDE * ctx.base.out_features:
            by_x = torch.cat((upstream, by_inner), 1) @ _above(ctx.base, a)
        elif ctx.needs_input_grad[0]:
            by_x = (upstream @ ctx.base.weight).addmm_(by_inner, a)
        return by_x, None, None, by_inner.T @ x, by_b, None


def _beside(base: Frozen, columns: Tensor) -> Tensor:
    """[W | columns] of columns [outputs, r]."""
    if isinstance(base, nn.Linear):
        return torch.cat((base.weight, columns), 1)
    found = columns.new_empty(base.out_features, base.in_features + columns.shape[1])
    base.dequantized(found[:, : base.in_features])
    found[:, base.in_features :] = columns
    return found


def _above(base: Frozen, rows: Tensor) -> Tensor:
    """W above rows [r, inputs]."""
    if isinstance(base, nn.Linear):
        return torch.cat((base.weight, rows))
    found = rows.new_empty(base.out_features + len(rows), base.in_features)
    base.dequantized(found[: base.out_features])
    found[base.out_features :] = rows
    return found


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
            assert isinstance(base, Frozen), f"{name} carries an adapter already"
            setattr(parent, leaf, LoraLinear(base, config))
            carriers.append(f"layers.{index}.{name}")
    return carriers


def detach(decoder: Decoder) -> dict[str, LoraLinear]:
    """Takes every adapter off, so that others can be attached to the same base; what `mount` puts back."""
    taken = dict(adapters(decoder))
    for name, layer in taken.items():
        decoder.set_submodule(name, layer.base)
    return taken


def mount(decoder: Decoder, layers: Mapping[str, LoraLinear]) -> None:
    """Puts adapters, by name, where they were attached to this base; none may be there."""
    for name, layer in layers.items():
        assert decoder.get_submodule(name) is layer.base, f"{name} carries another adapter"
        decoder.set_submodule(name, layer)


def adapters(decoder: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Canonical name, without `.weight`, and layer of everything that carries an adapter, in forward order."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def merged_state(decoder: Decoder) -> dict[str, Tensor]:
    """The canonical weights with every adapter added in, in float32, rounded to the type of W.

    A quantized base is dequantized: what the adapter was trained on, not what was quantized once. TensorMismatch unless
    every adapter changes its layer: an unchanged base is never the result of a merge.
    """
    if not any(adapters(decoder)):
        raise TensorMismatch("the model carries no adapter, so there is nothing to merge")
    state = {}
    for spec in decoder.config.tensors():
        owner, _, leaf = spec.name.rpartition(".")
        module = decoder.get_submodule(owner)
        carrier = module if isinstance(module, LoraLinear) else None
        value: Tensor = getattr(module if carrier is None else carrier.base, leaf)
        state[spec.name] = value
        if carrier is not None and leaf == "weight":
            state[spec.name] = carrier.merged().to(value.dtype)
            if torch.equal(state[spec.name], value) or not carrier.b.any():
                raise TensorMismatch(f"the adapter of {spec.name} changes nothing; it is untrained or lost in rounding")
    return state
