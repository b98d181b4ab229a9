"""One optimizer step over several packs of samples: each token weighs the same, wherever it was packed.

The numeric checks here cannot be switched off: a loss or a gradient that is not finite, or a loss of exactly zero,
ends the run before a weight is touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.optimizer import Optimizer
from smeltkit.errors import TrainingDiverged
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Samples that go through the model together, and what each token shall predict."""

    batch: Packed
    targets: Tensor
    """Next token of each token [T], IGNORED where there is none or it is not to be learnt."""
    counted: int
    """Targets that count, at least one."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step measured, before its update."""

    loss: float
    """Mean over the counted tokens of all packs, in nats."""
    grad_norm: float
    """Global norm of the gradients of that mean, before clipping."""
    tokens: int
    """Tokens that went through the model."""
    counted: int
    """Tokens of the loss."""


def train_step(
    decoder: Decoder, optimizer: Optimizer, packs: Sequence[Pack], *, learning_rate: float, clip_norm: float
) -> StepResult:
    """Accumulates the gradients of all packs, clips them together, updates the weights.

    TrainingDiverged, with the weights as they were, if loss or gradients are not finite or the loss is exactly zero.
    """
    counted = sum(pack.counted for pack in packs)
    total = torch.zeros((), device=packs[0].targets.device, dtype=torch.float32)
    for pack in packs:
        loss = decoder.loss(pack.batch, pack.targets) / counted
        loss.backward()
        total += loss.detach()
    grads = [parameter.grad for parameter in optimizer.parameters if parameter.grad is not None]
    norm = clip_(grads, clip_norm)
    result = StepResult(
        loss=total.item(),
        grad_norm=norm.item(),
        tokens=sum(len(pack.batch) for pack in packs),
        counted=counted,
    )
    check_numbers(result)
    optimizer.step(learning_rate)
    return result


def clip_(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """Scales gradients in place so that their global norm is at most `clip_norm`; the norm that they had.

    Equal to torch.nn.utils.clip_grad_norm_. Norms are made in float32, whatever the gradients are.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)))
    torch._foreach_mul_(list(grads), (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def check_numbers(result: StepResult) -> None:
    """Raises TrainingDiverged for a loss or a norm that no healthy step has."""
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        raise TrainingDiverged(
            f"loss {result.loss} and gradient norm {result.grad_norm}: not finite; the last checkpoint is kept."
            " Lower the learning rate, or look at the rows of this step"
        )
    if result.loss == 0.0:
        raise TrainingDiverged("the loss is exactly 0: nothing is being learnt; look at the response mask")
