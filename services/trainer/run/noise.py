"""The gradient noise scale: the batch, in learnt tokens, beyond which more tokens a step bring ever less.

McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv:1812.06162), appendix A.1. The gradient of a
step's first pack is one of a smaller batch than that of all its packs, so two squared norms a step give unbiased
estimates of the true gradient's squared norm and of the trace of its covariance; each is averaged over the steps, since
only their means can be divided. Tokens of one sample are no independent draws: the number is a guide, not a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

STEPS_MIN: Final = 20
"""Steps without which the averages say nothing."""
FAR: Final = 4.0
"""A batch this many times below or above the noise scale is worth a word."""


def noise_scale(steps: Iterable[Mapping[str, Any]]) -> float | None:
    """The noise scale in learnt tokens over reports of steps; None where it cannot be told from them.

    It cannot with one pack a step, with fewer than STEPS_MIN steps, or while noise hides the gradient altogether. Steps
    whose update was dropped as a spike are left out.
    """
    count, signal, noise = 0, 0.0, 0.0
    for step in steps:
        small, large = step["first_counted"], step["counted"]
        if step["first_grad_norm"] is None or step["is_skipped"] or small >= large:
            continue
        first, whole = step["first_grad_norm"] ** 2, step["grad_norm"] ** 2
        count += 1
        signal += (large * whole - small * first) / (large - small)
        noise += (first - whole) / (1 / small - 1 / large)
    return noise / signal if count >= STEPS_MIN and signal > 0 and noise > 0 else None


def advice(scale: float, batch: float) -> str:
    """What to think of steps of `batch` learnt tokens where the noise scale is `scale`; empty if they are about right.

    At the noise scale a run needs twice the fewest steps and twice the fewest tokens; below it more steps, above it
    more tokens (section 2.3).
    """
    said = f"a step learns {batch:,.0f} tokens, {batch / scale:.2g} of the gradient noise scale ({scale:,.0f})"
    if batch * FAR < scale:
        return f"{said}: larger steps (packs_per_step) take fewer of them for hardly more tokens"
    if batch > scale * FAR:
        return f"{said}: smaller steps (packs_per_step) learn as much from fewer tokens"
    return ""
