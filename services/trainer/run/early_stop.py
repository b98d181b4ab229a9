"""When a run stops early: once its held-out loss, smoothed, has not fallen for a while by more than its uncertainty.

It ends in the weights of its best measurement, whether it stopped or came to its last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from services.trainer.run.measured import Measured
from services.trainer.settings.ranges import within
from smeltkit.errors import UnsupportedOption
from smeltkit.paired import compare


@dataclass(frozen=True, kw_only=True)
class EarlyStopSettings:
    """Whether a run ends before its last step when its held-out loss has stopped falling, and in its best weights."""

    steps: int = 0
    """Steps between the measurements by which it is decided; 0 for never."""
    patience: int = 3
    """Measurements in a row that are no better than the best before, after which the run ends; 1 to 1000."""
    window: int = 1
    """Measurements that are averaged, row by row, into one; 1 to 1000."""

    def __post_init__(self) -> None:
        within("early_stop.steps", self.steps, 0, 10**9)
        within("early_stop.patience", self.patience, 1, 1000)
        within("early_stop.window", self.window, 1, 1000)
        defaults = (EarlyStopSettings.patience, EarlyStopSettings.window)
        if not self.steps and (self.patience, self.window) != defaults:
            raise UnsupportedOption("early_stop.patience and window have no effect with early_stop.steps=0; set steps")

    @property
    def first_step(self) -> int:
        """The earliest step after which a run can end."""
        return self.steps * (self.window + self.patience)


def why_stop(measured: Sequence[Measured], settings: EarlyStopSettings) -> str:
    """Why a run with these measurements ends now; empty if it goes on.

    Better is what is better than the best before by more than the 95 % interval over pairs of samples.
    """
    due = [one for one in measured if settings.steps and one.step and one.step % settings.steps == 0]
    best, since = 0, 0
    smoothed = [_mean(due[end - settings.window : end]) for end in range(settings.window, len(due) + 1)]
    for number in range(1, len(smoothed)):
        if compare(smoothed[best], smoothed[number]).is_better:
            best, since = number, 0
        else:
            since += 1
    if since < settings.patience:
        return ""
    found, step = compare(smoothed[best], smoothed[-1]), due[best + settings.window - 1].step
    return (
        f"held-out loss {found.after:.4f} is no better than after step {step} ({found.change:+.4f} [{found.low:+.4f},"
        f" {found.high:+.4f}]), nor were {since} measurements since"
    )


def best_of(measured: Sequence[Measured], settings: EarlyStopSettings, last_step: int = 0) -> Measured | None:
    """The measurement with the lowest loss, of those by which it is decided and that after `last_step`, if given; of
    equal ones the first. None without any, or without settings."""
    if not settings.steps:
        return None
    known = [one for one in measured if one.step and (one.step % settings.steps == 0 or one.step == last_step)]
    return min(known, key=lambda one: one.loss, default=None)


def _mean(window: Sequence[Measured]) -> list[float]:
    """Loss of each row, averaged over measurements."""
    return [fmean(row) for row in zip(*(one.losses for one in window), strict=True)]
