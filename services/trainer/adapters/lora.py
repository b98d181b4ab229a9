"""Low-rank adapters on the decoder's linear layers: W x + scale B A x, with W frozen, in floats or in NF4.

Hu et al. (arXiv:2106.09685); the rank-stabilized scale alpha / sqrt(r) is Kalajdzievski's (arXiv:2312.03732). A starts
uniform as torch starts a linear layer, B at zero, so an adapter begins as no change at all. DoRA (Liu et al.,
arXiv:2402.09353) also learns the length m of each row: m / |W + scale B A| times the sum, the divisor as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.adapters.carriers import Carrier, Frozen
from services.trainer.settings.training import LoraSettings

_WIDE: Final = 2
"""Quotient of widths from which the wider side is made in one product."""


class LoraLinear(Carrier):
    """A frozen linear layer and its adapter: A [r, inputs], B [outputs, r] and, of DoRA, the magnitudes m [outputs].

    They are float32, whatever the base is.
    """

    base_squares: Tensor

    def __init__(self, base: Frozen, config: LoraSettings) -> None:
        super().__init__(base)
        self.scale, self.dropout = config.scale, config.dropout
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
        if self._is_plain:
            return _adapted(x, (self,), with_bias=True)[0]
        is_dropping = self.dropout > 0 and self.training
        kept = functional.dropout(x, self.dropout) if is_dropping else x
        if self.magnitude is None:
            a, b = self.a.to(x.dtype), self.b.to(x.dtype)
            return torch.addmm(self.base(x), functional.linear(kept, a), b.T, alpha=self.scale)
        out = _adapted(kept, (self,), with_bias=False)[0]
        rest = self.base(x - kept) if is_dropping else self.base.bias
        # Half precision holds a gain less 1 far better than a gain near 1.
        return torch.addcmul(out if rest is None else out + rest, out, (self._gain(self.magnitude) - 1).to(x.dtype))

    @staticmethod
    def together(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """The outputs of layers that share an input: what they share is computed once."""
        plain = [layer for layer in layers if isinstance(layer, LoraLinear) and layer._is_plain]
        return _adapted(x, plain, with_bias=True) if len(plain) == len(layers) else tuple(each(x) for each in layers)

    @property
    def _is_plain(self) -> bool:
        """Whether nothing but W and B A makes the output."""
        return self.magnitude is None and not (self.dropout > 0 and self.training)

    @property
    def is_trained(self) -> bool:
        """Whether B is anything but zero."""
        return bool(self.b.any())

    def merged(self) -> Tensor:
        """See `Carrier`."""
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


def _adapted(x: Tensor, layers: Sequence[LoraLinear], *, with_bias: bool) -> tuple[Tensor, ...]:
    """x W^T + bias + scale (x A^T) B^T [T, outputs] of each layer."""
    parts = tuple(_Part(layer.base, layer.base.bias if with_bias else None, layer.scale) for layer in layers)
    parameters = (*(layer.a for layer in layers), *(layer.b for layer in layers))
    outs: tuple[Tensor, ...] = _Adapted.apply(x, parts, *parameters)  # type: ignore[no-untyped-call]
    return outs


class _Part(NamedTuple):
    """What is frozen of an adapted layer."""

    base: Frozen
    bias: Tensor | None
    scale: float


class _Adapted(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for layers of one input and frozen W, each sum made where its parts stand.

    Autograd alone would write the sums of outputs and of gradients by x as tensors of their own, once more through
    memory for each adapter and each layer; here the As are one matrix, and every product is added to what is there.
    Where outputs are much wider than x, even that costs more than one product of longer rows for all layers,
    [x | x A^T] [W | scale B]^T, with the copy of both that this takes; likewise backward where x is much wider. W is
    asked for again in the backward pass, so that one in NF4 is never kept dequantized.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[_Part, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        """`parameters` are every A and then every B. Keeps x, as the layers' neighbours do, and the [T, r] products."""
        rows, columns = parameters[: len(parts)], parameters[len(parts) :]
        ctx.parts, ctx.dtype, ranks = parts, rows[0].dtype, [len(a) for a in rows]
        above, *halves = x.new_empty(sum(ranks), x.shape[1]), *(b.new_empty(b.shape, dtype=x.dtype) for b in columns)
        torch._foreach_copy_([*above.split(ranks), *halves], list(parameters))
        inner = functional.linear(x, above)
        ctx.save_for_backward(x, above, inner, *halves)
        if sum(part.base.out_features for part in parts) >= _WIDE * x.shape[1]:
            biases = [part.bias for part in parts if part.bias is not None]
            wide = functional.linear(
                torch.cat((x, inner), 1), _beside(parts, halves), torch.cat(biases) if biases else None
            )
            outs: tuple[Tensor, ...] = wide.split([part.base.out_features for part in parts], 1)
            return outs
        return tuple(
            functional.linear(x, part.base.weight, part.bias).addmm_(own, b.T, alpha=part.scale)
            for part, own, b in zip(parts, inner.split(ranks, 1), halves, strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, every A and every B."""
        x, above, inner, *halves = ctx.saved_tensors
        ranks = [b.shape[1] for b in halves]
        by_inner, by_columns = torch.empty_like(inner), []
        for part, upstream, b, own, target in zip(
            ctx.parts, upstreams, halves, inner.split(ranks, 1), by_inner.split(ranks, 1), strict=True
        ):
            torch.addmm(target, upstream, b, beta=0, alpha=part.scale, out=target)
            by_columns.append(torch.addmm(own[:1], upstream.T, own, beta=0, alpha=part.scale))
        by_x = _by_input(ctx.parts, upstreams, by_inner, above) if ctx.needs_input_grad[0] else None
        found = [*(by_inner.T @ x).split(ranks), *by_columns]
        grads = [torch.empty_like(value, dtype=ctx.dtype) for value in found]
        torch._foreach_copy_(grads, found)
        return by_x, None, *grads


def _by_input(parts: Sequence[_Part], upstreams: Sequence[Tensor], by_inner: Tensor, above: Tensor) -> Tensor:
    """The gradient by x [T, inputs]: every upstream by its W, and `by_inner` [T, r] by all As [r, inputs]."""
    if len(parts) == 1 and above.shape[1] >= _WIDE * parts[0].base.out_features:
        return torch.cat((upstreams[0], by_inner), 1) @ _above(parts[0].base, above)
    found = upstreams[0] @ parts[0].base.weight
    for part, upstream in zip(parts[1:], upstreams[1:], strict=True):
        found.addmm_(upstream, part.base.weight)
    return found.addmm_(by_inner, above)


def _beside(parts: Sequence[_Part], columns: Sequence[Tensor]) -> Tensor:
    """[W | scale B] of each part, one above the other, each B in columns of its own."""
    heights, widths = zip(*(b.shape for b in columns), strict=True)
    inputs = parts[0].base.in_features
    found = columns[0].new_empty(sum(heights), inputs + sum(widths))
    if len(parts) > 1:
        found[:, inputs:].zero_()
    begins = [inputs + sum(widths[:number]) for number in range(len(parts))]
    for part, b, begin, rows in zip(parts, columns, begins, found.split(heights), strict=True):
        _write(part.base, rows[:, :inputs])
        torch.mul(b, part.scale, out=rows[:, begin : begin + b.shape[1]])
    return found


def _above(base: Frozen, rows: Tensor) -> Tensor:
    """W above rows [r, inputs]."""
    found = rows.new_empty(base.out_features + len(rows), base.in_features)
    _write(base, found[: base.out_features])
    found[base.out_features :] = rows
    return found


def _write(base: Frozen, target: Tensor) -> None:
    """Writes W to `target` [outputs, inputs], a part of a larger matrix."""
    if isinstance(base, nn.Linear):
        target.copy_(base.weight)
    else:
        base.dequantized(target)
