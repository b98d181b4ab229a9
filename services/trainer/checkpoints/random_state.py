"""The state of torch's random generators, by name: the CPU's and, where there is a GPU, that of the one in use.

What a training draws comes of the generator of its device: dropout on a GPU moves the GPU's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

NAMES: Final = ("cpu", "cuda")


def random_state() -> dict[str, Tensor]:
    """The present state of each generator that there is, as bytes on the CPU."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Puts generators into the state that `random_state` gave; what is told of but one side is passed over."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
