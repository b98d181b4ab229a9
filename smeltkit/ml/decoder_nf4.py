"""A decoder whose blocks hold NF4 weights: frozen, dequantized when they are used, forward and backward.

Embedding, head and norms stay as they are. What a product is made with is the dequantized weight, to the last bit, so
whoever adds an adapter to it gets what the adapter was trained on.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smeltkit.ml.decoder import Decoder
from smeltkit.ml.kernels import Kernels
from smeltkit.ml.nf4 import Nf4, quantize

SCHEME = "nf4"


class Nf4Linear(nn.Module):
    """A frozen linear layer in NF4; `weight` [outputs, inputs] is made anew whenever it is asked for."""

    def __init__(self, base: nn.Linear, kernels: Kernels) -> None:
        """Quantizes the weight of `base`; its bias is kept, and its type is that of every dequantized weight."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dtype, self._kernels = base.weight.dtype, kernels
        found = quantize(base.weight)
        self.codes, self.scale_codes, self.scale_maxima, self.scale_mean = (
            nn.Parameter(part, requires_grad=False)
            for part in (found.codes, found.scale_codes, found.scale_maxima, found.scale_mean)
        )
        self.bias = base.bias

    @property
    def weight(self) -> Tensor:
        """The weight that every product is made with."""
        return self.dequantized()

    def dequantized(self, out: Tensor | None = None) -> Tensor:
        """The weight, written to `out` [outputs, inputs] if given, which may be a part of a larger matrix."""
        stored = Nf4(
            codes=self.codes,
            scale_codes=self.scale_codes,
            scale_maxima=self.scale_maxima,
            scale_mean=self.scale_mean,
            shape=(self.out_features, self.in_features),
        )
        return self._kernels.dequantize_nf4(stored, self.dtype, out)

    def forward(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs]."""
        out: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Frozen(torch.autograd.Function):
    """x W^T + bias, with W dequantized once more for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        """Keeps nothing but the layer."""
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        """Gradient by x."""
        return upstream @ ctx.layer.weight, None


@torch.no_grad()
def quantize_linears(decoder: Decoder) -> None:
    """Replaces every linear layer of every block, one after the other, so that one of them is held twice at a time."""
    for layer in decoder.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, Nf4Linear(module, decoder.kernels))


def dequantization(decoder: Decoder) -> dict[str, Any]:
    """What the frozen base of a decoder is, exactly, as plain values; empty if none of it is quantized.

    The digest is over the stored parts of every quantized layer; with the type they decide each dequantized weight.
    """
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, Nf4Linear)}
    if not layers:
        return {}
    found, types = hashlib.sha256(), {str(module.dtype).removeprefix("torch.") for module in layers.values()}
    for name, module in layers.items():
        for part in (module.codes, module.scale_codes, module.scale_maxima, module.scale_mean):
            found.update(name.replace(".base", "").encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"scheme": SCHEME, "dtype": ",".join(sorted(types)), "digest": f"sha256:{found.hexdigest()}"}
