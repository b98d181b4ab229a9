"""Spikes: steps whose gradient or loss is far outside of what the run has shown so far, and what is done about them.

A gradient norm beyond so many deviations of its running mean is clipped the more, the further out it is (ZClip, Kumar
et al., arXiv:2504.02507, equation 7). A loss beyond them drops the step's update. Where several updates in a row had to
be dropped, the weights are bad already: they go back to the newest checkpoint, while data and schedule go on, so that
the rows at fault are not met again (as in PaLM, arXiv:2204.02311, section 5.1). A run that needs this too often ends.

Nothing here touches a tensor; the state is plain numbers and travels in checkpoints, so a resumed run judges alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from services.trainer.settings.spikes import SpikeSettings
from smeltkit.errors import TrainingDiverged

HISTORY_STEPS: Final = 25
"""Steps that a run must have shown before one of them can be a spike."""
DECAY: Final = 0.97
"""Weight of the past in running means, as in ZClip."""
FLOOR: Final = 0.05
"""Least deviation by the mean: what stays within it is no spike, however even the run was."""


@dataclass(kw_only=True)
class Running:
    """Mean and variance of a series: plain over the first HISTORY_STEPS values, decaying afterwards."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation, at least FLOOR of the mean."""
        return max(math.sqrt(self.variance), FLOOR * abs(self.mean))

    def score(self, value: float) -> float:
        """By how many deviations a value lies above the mean; 0 while there is too little history."""
        if self.count < HISTORY_STEPS or self.deviation == 0:
            return 0.0
        return (value - self.mean) / self.deviation

    def add(self, value: float) -> None:
        """Takes a value in."""
        self.count += 1
        weight = 1 / self.count if self.count <= HISTORY_STEPS else 1 - DECAY
        before = value - self.mean
        self.mean += weight * before
        self.variance = (1 - weight) * (self.variance + weight * before**2)


@dataclass(kw_only=True)
class SpikeState:
    """What the guard remembers."""

    loss: Running = field(default_factory=Running)
    norm: Running = field(default_factory=Running)
    in_row: int = 0
    """Updates dropped since the last one that was made."""
    clipped: int = 0
    skipped: int = 0
    rollbacks: int = 0


class SpikeGuard:
    """Judges every step of one run."""

    def __init__(self, settings: SpikeSettings) -> None:
        self._settings = settings
        self._state = SpikeState()

    def bound(self, loss: float, norm: float) -> float:
        """What a step's gradient norm may be: infinite for a healthy one, 0 if the update is to be dropped."""
        state, sigmas = self._state, self._settings.sigmas
        if self._settings.action in ("skip", "rollback") and state.loss.score(loss) > sigmas:
            state.skipped += 1
            state.in_row += 1
            return 0.0
        state.in_row = 0
        state.loss.add(loss)
        score = state.norm.score(norm)
        if self._settings.action == "none" or score <= sigmas:
            state.norm.add(norm)
            return math.inf
        allowed = state.norm.mean + sigmas**2 / score * state.norm.deviation
        state.norm.add(allowed)
        state.clipped += 1
        return allowed

    @property
    def must_go_back(self) -> bool:
        """Whether so many updates in a row were dropped that the weights are to go back."""
        return self._settings.action == "rollback" and self._state.in_row >= self._settings.patience

    def go_back(self) -> None:
        """Counts a rollback; TrainingDiverged if the run has had as many as it may."""
        if self._state.rollbacks >= self._settings.rollbacks_max:
            raise TrainingDiverged(
                f"the loss left its course {self._state.rollbacks + 1} times; the last checkpoint is kept. Lower the"
                " learning rate, or look at the rows of these steps"
            )
        self._state.rollbacks += 1
        self._state.in_row = 0

    @property
    def counts(self) -> dict[str, int]:
        """Steps clipped, updates dropped, rollbacks."""
        return {name: getattr(self._state, name) for name in ("clipped", "skipped", "rollbacks")}

    def state(self) -> dict[str, Any]:
        """Everything remembered, as plain values."""
        return asdict(self._state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remembers what `state` gave."""
        loss, norm = Running(**state["loss"]), Running(**state["norm"])
        self._state = SpikeState(**{**state, "loss": loss, "norm": norm})
