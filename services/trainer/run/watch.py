"""What tells a healthy training from one that only looks like it: dead gradients, frozen weights that move, a stuck
loss. None of it can be switched off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from services.trainer.optim.optimizer import Optimizer
from services.trainer.parallel.ranks import ALONE, Ranks
from services.trainer.parallel.sharding import held
from smeltkit.errors import DeadGradient, SettingsDiffer, TrainingDiverged


def frozen_print(model: nn.Module) -> dict[str, int]:
    """A number for every frozen parameter that changes with any of its bits, by name."""
    return {name: _print(held(value)) for name, value in model.named_parameters() if not value.requires_grad}


def check_frozen(model: nn.Module, before: dict[str, int]) -> None:
    """Raises DeadGradient if a frozen parameter is not bit for bit what it was."""
    after = frozen_print(model)
    moved = [name for name, value in before.items() if after[name] != value]
    if moved:
        raise DeadGradient(f"{len(moved)} frozen tensors moved in one step, e.g. {moved[0]}")


def check_alive(optimizer: Optimizer, *, is_first: bool, ranks: Ranks = ALONE) -> None:
    """Raises DeadGradient unless every trainable tensor has had a finite gradient that is not all zero.

    Read from the optimizer's mean of squared gradients, so it is what the update really used. In the first step an
    adapter's A has none by construction, because its B is zero; it must have one in the second.
    """
    state = optimizer.state()
    squares = [state[f"{name}.exp_avg_sq"] for name in optimizer.names]
    alive = ranks.summed(torch.stack([square.any() for square in squares]).float()).tolist()
    broken = ranks.summed(torch.stack([(~torch.isfinite(square)).any() for square in squares]).float()).tolist()
    for name, is_alive, is_broken in zip(optimizer.names, alive, broken, strict=True):
        if is_first and name.endswith(".a"):
            continue
        if is_broken or not is_alive:
            raise DeadGradient(f"{name} gets no gradient (or one that is not finite), so it would never learn")


def check_rate(optimizer: Optimizer, planned: float) -> None:
    """Raises SettingsDiffer unless the learning rate in use is the planned one."""
    used = optimizer.in_use()["learning_rate"]
    if used != planned:
        raise SettingsDiffer(f"the optimizer used a learning rate of {used}, but {planned} was planned")


def check_moving(losses: Sequence[float], stuck_steps: int) -> None:
    """Raises TrainingDiverged if the last `stuck_steps` losses are one and the same number."""
    recent = losses[-stuck_steps:]
    if len(recent) == stuck_steps and len(set(recent)) == 1:
        raise TrainingDiverged(f"the loss was {recent[0]} for {stuck_steps} steps in a row; nothing is being learnt")


def _print(value: Tensor) -> int:
    """Sum of the bits as whole numbers, each weighted by its place, so that a swap counts as well."""
    bits = value.detach().contiguous().view(torch.uint8).flatten().to(torch.int64)
    places = torch.arange(len(bits), device=bits.device) % 65_521 + 1
    return int((bits * places).sum())
