"""AdamW whose moments are kept in 8 bits, see `smeltkit.ml.int8`: 2 bytes a weight instead of 8.

Every update is computed in float32 from moments that are exact for this step's gradient. Tensors of fewer than SMALL
values keep float32 moments, as do vectors, whose values are few and far apart.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from services.trainer.optim.parameterwise import Parameterwise, State, adam_step
from smeltkit.ml.int8 import Coded, zeros
from smeltkit.ml.kernels import kernels_for
from smeltkit.ml.kernels.reference import adamw_

SMALL: Final = 4096
MOMENTS: Final = {"exp_avg": True, "exp_avg_sq": False}
"""Name of each, and whether it can be negative."""


class Int8AdamW(Parameterwise):
    """For float32 parameters.

    State of a quantized parameter is `exp_avg` and `exp_avg_sq` as codes [values], and `.._scale` [blocks] of each.
    """

    @staticmethod
    def moments_of(parameter: Tensor) -> State:
        """Zeros, coded or in float32."""
        if not is_quantized(parameter):
            return {name: torch.zeros_like(parameter) for name in MOMENTS}
        state: State = {}
        for name, is_signed in MOMENTS.items():
            zero = zeros(parameter.numel(), is_signed=is_signed, device=parameter.device)
            state |= {name: zero.codes, f"{name}_scale": zero.scales}
        return state

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: State, count: int, group: dict[str, Any]) -> None:
        """Updates, coded moments block by block."""
        step = adam_step(group, count)
        if not is_quantized(parameter):
            adamw_(parameter, grad, state["exp_avg"], state["exp_avg_sq"], step)
            return
        mean, square = (
            Coded(codes=state[name], scales=state[f"{name}_scale"], is_signed=is_signed)
            for name, is_signed in MOMENTS.items()
        )
        kernels_for(parameter.device.type).int8_adamw(parameter.view(-1), grad.reshape(-1), mean, square, step)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    return parameter.dim() > 1 and parameter.numel() >= SMALL
