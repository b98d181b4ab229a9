"""When a step is a spike, and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.settings.ranges import among, within


@dataclass(frozen=True, kw_only=True)
class SpikeSettings:
    """What is done about a step far outside of the run's course; a number that is not finite ends it in any case."""

    action: str = "rollback"
    """none; clip: bound the gradient; skip: also drop the update; rollback: also go back to the last checkpoint."""
    sigmas: float = 6.0
    """Deviations above the running mean from which a gradient norm or a loss is a spike."""
    patience: int = 3
    """Updates dropped in a row after which the weights go back."""
    rollbacks_max: int = 3
    """Rollbacks that a run may need before it ends."""

    def __post_init__(self) -> None:
        among("spikes.action", self.action, ("none", "clip", "skip", "rollback"))
        within("spikes.sigmas", self.sigmas, 1.0, 100.0)
        within("spikes.patience", self.patience, 1, 1000)
        within("spikes.rollbacks_max", self.rollbacks_max, 0, 1000)
