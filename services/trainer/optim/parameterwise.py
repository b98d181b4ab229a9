"""What optimizers share that update one parameter after the other: groups, state from nothing, counted steps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from smeltkit.ml.kernels.reference import AdamStep

State = dict[str, Tensor]


class Parameterwise(torch.optim.Optimizer):
    """Groups as torch.optim.AdamW has them, and `scale`, what gradients are multiplied by; `step` in every state."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"scale": 1.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter from its gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.zeros(()), **self.moments_of(parameter)}
                state["step"] += 1
                self.update(parameter, parameter.grad, state, int(state["step"].item()), group)

    @staticmethod
    @abstractmethod
    def moments_of(parameter: Tensor) -> State:
        """Both moments of a parameter before its first update: zero."""

    @staticmethod
    @abstractmethod
    def update(parameter: Tensor, grad: Tensor, state: State, count: int, group: dict[str, Any]) -> None:
        """Updates a parameter and its state in place, for the time `count`, from 1."""


def adam_step(group: dict[str, Any], count: int, seed: int = 0) -> AdamStep:
    """Update `count` of a group, as kernels take it; with a `seed` of random bits where they need any."""
    return AdamStep(
        learning_rate=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        grad_scale=group["scale"],
        count=count,
        seed=seed,
    )
