"""Adapters that take turns on one base: in its turn one is all that is on it, and draws its own random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.trainer.adapters.carriers import detach, mount
from services.trainer.checkpoints.random_state import random_state, set_random_state
from smeltkit.ml.decoder import Decoder


class Turns:
    """The adapters that are on a decoder now, taken off until their turn. The random state goes with them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._layers, self._random = detach(decoder), random_state()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The adapters on the base and their random state in place, for as long as the block lasts."""
        mount(self._decoder, self._layers)
        set_random_state(self._random)
        try:
            yield
        finally:
            self._random = random_state()
            detach(self._decoder)
