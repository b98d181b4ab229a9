"""The learning rate of every step, as a formula of the step: what is planned is what is executed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from smeltkit.errors import BadSchedule

KINDS: Final = ("cosine", "linear", "constant", "wsd")
WARMUP_SHARE_MAX: Final = 0.1
"""Largest share of all steps that may pass before the full rate is reached."""
DECAY_SHARE: Final = 0.2
"""Share of all steps in which `wsd` (warm-up, stable, decay) comes down."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to the peak, then a descent to `final_share` of it at the last step."""

    kind: str
    peak: float
    """Highest learning rate."""
    warmup_steps: int
    total_steps: int
    final_share: float = 0.1
    """Last learning rate by the peak; without effect for `constant`."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        begin = self.warmup_steps if self.kind != "wsd" else self.total_steps - round(DECAY_SHARE * self.total_steps)
        if self.kind == "constant" or step < begin:
            return self.peak
        done = (step - begin) / max(self.total_steps - 1 - begin, 1)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.peak * (self.final_share + (1 - self.final_share) * left)

    def refusals(self, *, horizon_steps: int) -> list[BadSchedule]:
        """Why this schedule cannot do what it says, or is not the one that the recipe believes in (0: any); empty if
        it can."""
        found = []
        if self.warmup_steps > WARMUP_SHARE_MAX * self.total_steps:
            found.append(
                BadSchedule(
                    f"warmup_steps={self.warmup_steps} of {self.total_steps} steps is more than"
                    f" {WARMUP_SHARE_MAX:.0%}; at most {int(WARMUP_SHARE_MAX * self.total_steps)}"
                )
            )
        if horizon_steps not in (0, self.total_steps):
            found.append(
                BadSchedule(f"horizon_steps={horizon_steps}, but the run has {self.total_steps}; leave it out")
            )
        return found
