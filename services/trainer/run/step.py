"""One optimizer step over several packs of samples: each token weighs the same, wherever it was packed, and in
whichever process.

The numeric checks here cannot be switched off: a loss or a gradient that is not finite, or a loss of exactly zero,
ends the run before a weight is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.adapters.adalora import Allocation
from services.trainer.optim.optimizer import Optimizer
from services.trainer.parallel.ranks import ALONE, Ranks
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
    """Targets that count; at least one in all processes that share the pack."""
    is_idle: bool = False
    """Whether it only keeps a process in step with others that have something to do."""


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
    first_counted: int
    """Those of the first pack."""
    first_grad_norm: float | None
    """Norm of the gradient of the first pack's own mean; None if there is but one pack, or a penalty. See
    `noise`."""
    is_skipped: bool
    """Whether the update was dropped."""


Bound = Callable[[float, float], float]
"""Loss and gradient norm to what the norm may be; 0 to drop the update. See `spikes`."""


def train_step(
    decoder: Decoder,
    optimizer: Optimizer,
    packs: Sequence[Pack],
    *,
    learning_rate: float,
    clip_norm: float,
    bound: Bound = lambda loss, norm: math.inf,
    ranks: Ranks = ALONE,
    allocation: Allocation | None = None,
) -> StepResult:
    """Accumulates the gradients of all packs, clips them together, updates the weights unless `bound` forbids it.

    The penalty of an `allocation`, which hears of the gradients, is learnt beside the loss, and no part of what is told
    as loss. Each of `ranks` comes with as many packs, one of them at least with something to learn. TrainingDiverged,
    with the weights as they were, if loss or gradients are not finite or the loss is exactly zero.
    """
    device = packs[0].targets.device
    tokens, counted, first_counted = ranks.totals(
        ranks.is_teller * sum(len(pack.batch) for pack in packs if not pack.is_idle),
        ranks.is_teller * sum(pack.counted for pack in packs),
        ranks.is_teller * packs[0].counted,
        device=device,
    )
    total = torch.zeros((), device=device, dtype=torch.float32)
    first = None
    for number, pack in enumerate(packs, start=1):
        part = decoder.loss(pack.batch, pack.targets, counted)
        part.backward()
        total += part.detach()
        if number == 1 < len(packs) and allocation is None:
            first = norm_of(optimizer.told_grads(ranks), ranks) * (counted / first_counted)
    if allocation is not None:
        allocation.penalty().backward()
    norm, total = norm_of(optimizer.told_grads(ranks), ranks), ranks.summed(total * ranks.is_teller)
    loss, grad_norm, first_norm = total.item(), norm.item(), None if first is None else first.item()
    check_numbers(loss, grad_norm)
    allowed = bound(loss, grad_norm)
    if allowed > 0:
        scale = clip_factor(grad_norm, min(clip_norm, allowed))
        if allocation is not None:
            allocation.see(scale)
        optimizer.step(learning_rate, scale)
    else:
        decoder.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        tokens=tokens,
        counted=counted,
        first_counted=first_counted,
        first_grad_norm=first_norm,
        is_skipped=allowed <= 0,
    )


def norm_of(grads: Sequence[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """Global norm of gradients, made in float32 whatever they are; of parts, over those of all processes."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)))
    return norm if ranks.count == 1 else ranks.summed(norm.square()).sqrt()


def clip_factor(norm: float, norm_max: float) -> float:
    """What gradients of global norm `norm` are multiplied by to have `norm_max` at most, as torch.nn.utils has it."""
    return min(norm_max / (norm + 1e-6), 1.0)


def check_numbers(loss: float, grad_norm: float) -> None:
    """Raises TrainingDiverged for a loss or a norm that no healthy step has."""
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise TrainingDiverged(
            f"loss {loss} and gradient norm {grad_norm}: not finite; the last checkpoint is kept."
            " Lower the learning rate, or look at the rows of this step"
        )
    if loss == 0.0:
        raise TrainingDiverged("the loss is exactly 0: nothing is being learnt; look at the response mask")
