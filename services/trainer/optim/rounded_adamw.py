"""AdamW that keeps bf16 weights and bf16 moments and nothing else: 8 bytes a weight with its gradient instead of 16.

Rounding to nearest would lose every update below half a step of bf16, and the mean of squares hardly moves otherwise;
so weights and moments are rounded stochastically, right on average (Gupta et al., arXiv:1502.02551).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.trainer.optim.parameterwise import Parameterwise, State, adam_step
from smeltkit.ml.kernels import kernels_for


class RoundedAdamW(Parameterwise):
    """For bf16 parameters; state as torch.optim.AdamW has it.

    The random bits of a step come from a seed drawn of torch's CPU generator, so a run that restores that generator
    goes on with the same ones.
    """

    @staticmethod
    def moments_of(parameter: Tensor) -> State:
        """Zeros in bf16."""
        return {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: State, count: int, group: dict[str, Any]) -> None:
        """Draws a seed and updates."""
        step = adam_step(group, count, seed=int(torch.randint(2**31 - 1, ()).item()))
        update = kernels_for(parameter.device.type).rounded_adamw
        update(parameter, grad, state["exp_avg"], state["exp_avg_sq"], step)
