"""AdamW that keeps bf16 weights and bf16 moments and nothing else: 8 bytes a weight with its gradient instead of 16.

Rounding to nearest would lose every update below half a step of bf16, and the mean of squares hardly moves otherwise;
so weights and moments are rounded stochastically, right on average (Gupta et al., arXiv:1502.02551).
"""

from __future__ import annotations

from typing import Any

import torch

from smeltkit.ml.kernels import kernels_for
from smeltkit.ml.kernels.reference import AdamStep


class RoundedAdamW(torch.optim.Optimizer):
    """For bf16 parameters; groups and state as torch.optim.AdamW has them, `lr`, `betas`, `eps`, `weight_decay`.

    The random bits of a step come from a seed drawn of torch's CPU generator, so a run that restores that generator
    goes on with the same ones.
    """

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter from its gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                state["step"] += 1
                how = AdamStep(
                    learning_rate=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    count=int(state["step"].item()),
                    seed=int(torch.randint(2**31 - 1, ()).item()),
                )
                update = kernels_for(parameter.device.type).rounded_adamw
                update(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], how)
