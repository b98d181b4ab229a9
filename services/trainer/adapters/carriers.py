"""Frozen linear layers that carry an adapter: found on a base, taken off, put back, merged into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from smeltkit.errors import TensorMismatch
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import Nf4Linear

Frozen = nn.Linear | Nf4Linear
"""What an adapter can be put on: `weight`, for NF4 made anew whenever it is asked for, and `bias`."""
C = TypeVar("C", bound="Carrier")


class Carrier(nn.Module):
    """A frozen layer `base` and, as parameters of its own, what is learnt of it; they are float32, whatever it is."""

    def __init__(self, base: Frozen) -> None:
        super().__init__()
        self.base = base

    @property
    def is_trained(self) -> bool:
        """Whether it computes anything but the base."""
        raise NotImplementedError

    @property
    def is_emptied(self) -> bool:
        """Whether all that it learnt was taken away again, as others need it more: its layer is then the base's."""
        return False

    def merged(self) -> Tensor:
        """The one weight [outputs, inputs] in float32 that computes the same without an adapter."""
        raise NotImplementedError

    def merged_bias(self) -> Tensor:
        """The bias [outputs] beside it; that of the base, which must have one, unless the adapter changes it."""
        return self.base.bias


def detach(decoder: Decoder) -> dict[str, Carrier]:
    """Takes every adapter off, so that others can be attached to the same base; what `mount` puts back."""
    taken = dict(adapters(decoder, Carrier))
    for name, layer in taken.items():
        decoder.set_submodule(name, layer.base)
    return taken


def mount(decoder: Decoder, layers: Mapping[str, Carrier]) -> None:
    """Puts adapters, by name, where they were attached to this base; none may be there."""
    for name, layer in layers.items():
        assert decoder.get_submodule(name) is layer.base, f"{name} carries another adapter"
        decoder.set_submodule(name, layer)


def adapters(decoder: Decoder, kind: type[C]) -> Iterator[tuple[str, C]]:
    """Canonical name, without `.weight`, and layer of all that carries an adapter of a kind, in forward order."""
    for name, module in decoder.named_modules():
        if isinstance(module, kind):
            yield name, module


@torch.no_grad()
def merged_state(decoder: Decoder) -> dict[str, Tensor]:
    """The canonical weights with every adapter merged in, in float32, rounded to the type of W.

    A quantized base is dequantized: what the adapter was trained on, not what was quantized once. TensorMismatch unless
    every adapter changes its layer, unless it was emptied: an unchanged base is never the result of a merge.
    """
    if not any(adapters(decoder, Carrier)):
        raise TensorMismatch("the model carries no adapter, so there is nothing to merge")
    if not any(layer.is_trained for _, layer in adapters(decoder, Carrier)):
        raise TensorMismatch("every adapter changes nothing; they are untrained")
    state = {}
    for spec in decoder.config.tensors():
        owner, _, leaf = spec.name.rpartition(".")
        module = decoder.get_submodule(owner)
        if not isinstance(module, Carrier):
            state[spec.name] = getattr(module, leaf)
            continue
        value: Tensor = getattr(module.base, leaf)
        state[spec.name] = (module.merged() if leaf == "weight" else module.merged_bias()).to(value.dtype)
        if (
            leaf == "weight"
            and not module.is_emptied
            and (torch.equal(state[spec.name], value) or not module.is_trained)
        ):
            raise TensorMismatch(f"the adapter of {spec.name} changes nothing; it is untrained or lost in rounding")
    return state
