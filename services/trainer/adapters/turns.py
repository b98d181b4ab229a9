"""Adapters that take turns on one base: in its turn one is all that is on it, and draws its own random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from services.trainer.adapters.lora import detach, mount
from smeltkit.ml.decoder import Decoder

RandomState = tuple[Tensor, Tensor | None]


class Turns:
    """The adapters that are on a decoder now, taken off until their turn. The random state goes with them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._layers, self._random = detach(decoder), _random_state()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The adapters on the base and their random state in place, for as long as the block lasts."""
        mount(self._decoder, self._layers)
        _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state()
            detach(self._decoder)


def _random_state() -> RandomState:
    """State of torch's generators: the CPU's, and the GPU's if there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
