"""Alerts: what in a run's numbers somebody should look at, told while the run goes on.

Every step is judged, in the process that makes it. Three things only others can see: that no step comes any more, that
a process was lost, and how the run ended. An alert goes off once its condition has held for as many steps in a row as
it says, and again only after it was over in between. A metric that is no finite number sets off any alert on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from services.trainer.optim.schedule import Schedule
from services.trainer.run.spikes import HISTORY_STEPS, Running
from services.trainer.settings.alerts import DEFAULT_ALERTS, AlertSettings
from smeltkit.errors import BadConfig, TrainingDiverged

DIVERGED: Final = "diverged"
"""What is told of a run that ended because its numbers were no course any more."""
LOST: Final = "lost"
"""What is told of a run whose processes began again at a checkpoint."""
CHANGED: Final = "changed"
"""What is told of a run whose later steps another revision of the code did."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """An alert that went off."""

    step: int
    """The step, from 1; 0 before the first."""
    metric: str
    when: str
    measured: float | None
    """The metric; None where it was no finite number."""
    message: str
    """One line for people."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(kw_only=True)
class _Watch:
    """One alert over a series."""

    settings: AlertSettings
    course: Running = field(default_factory=Running)
    last: float = math.nan
    in_row: int = 0

    def judge(self, step: int, value: float) -> Alert | None:
        """Whether the alert goes off at this step."""
        is_number, name, before = math.isfinite(value), self.settings.metric, self.in_row
        if not is_number:
            self.in_row = max(self.in_row + 1, self.settings.steps)
        elif self._holds(value):
            self.in_row += 1
        else:
            self.in_row = 1 if self.settings.when == "constant" else 0
        self.last = value
        if not before < self.settings.steps <= self.in_row:
            return None
        text = self._text(value) if is_number else f"{name} is {value}"
        return Alert(
            step=step,
            metric=name,
            when=self.settings.when,
            measured=value if is_number else None,
            message=f"step {step}: {text}",
        )

    def _holds(self, value: float) -> bool:
        when, bound = self.settings.when, self.settings.value
        if when == "above":
            return value > bound
        if when == "below":
            return value < bound
        if when == "constant":
            return value == self.last
        is_known = self.course.count >= HISTORY_STEPS
        is_off = self.course.score(value) > bound if when == "spike" else is_known and value < bound * self.course.mean
        if not is_off:
            self.course.add(value)
        return is_off

    def _text(self, value: float) -> str:
        name, when, bound = self.settings.metric, self.settings.when, self.settings.value
        text = {
            "above": f"{name} {value:.4g} is above {bound:g}",
            "below": f"{name} {value:.4g} is below {bound:g}",
            "spike": f"{name} {value:.4g} is more than {bound:g} deviations above its course of {self.course.mean:.4g}",
            "drop": f"{name} {value:.4g} is below {bound:g} of its course of {self.course.mean:.4g}",
            "constant": f"{name} is {value:.4g} and does not change",
        }[when]
        return f"{text}, {self.settings.steps} steps in a row" if self.settings.steps > 1 else text


class Alerts:
    """Judges the steps of one run, in their order."""

    def __init__(self, settings: Sequence[AlertSettings]) -> None:
        self._watches = [_Watch(settings=one) for one in settings if one.when != "silent"]

    def judge(self, step: Mapping[str, Any]) -> list[Alert]:
        """The alerts that go off at this step."""
        found = (one.judge(step["step"], step[one.settings.metric]) for one in self._watches)
        return [alert for alert in found if alert is not None]


class Silence:
    """Notices that no step comes any more. Its clock is the caller's."""

    def __init__(self, settings: Sequence[AlertSettings], now_s: float) -> None:
        self._bounds_s = sorted({one.value for one in settings if one.when == "silent"})
        self._heard_s, self._told = now_s, 0

    def heard(self, now_s: float) -> None:
        """A step came."""
        self._heard_s, self._told = now_s, 0

    def judge(self, step: int, now_s: float) -> list[Alert]:
        """The alerts that go off now, `step` being the newest one."""
        silent_s = now_s - self._heard_s
        due = [bound_s for bound_s in self._bounds_s[self._told :] if silent_s > bound_s]
        self._told += len(due)
        return [
            Alert(
                step=step,
                metric="step",
                when="silent",
                measured=bound_s,
                message=f"step {step}: none for {bound_s:g} s",
            )
            for bound_s in due
        ]


def of_outcome(step: int, outcome: Mapping[str, Any]) -> list[Alert]:
    """The alerts of a run that diverged, or whose code changed on the way; none for any other end."""
    found = [
        Alert(step=done, metric="code", when=CHANGED, measured=None, message=f"step {done}: from here on by {revision}")
        for revision, done in outcome.get("codes", ())[1:]
    ]
    if outcome.get("reason") == TrainingDiverged.reason():
        message = f"step {step}: {outcome['message']}"
        found.append(Alert(step=step, metric="loss", when=DIVERGED, measured=None, message=message))
    return found


def of_restart(step: int, message: str) -> Alert:
    """The alert of a group of processes that was started again."""
    return Alert(step=step, metric="process", when=LOST, measured=None, message=f"step {step}: {message}")


def never_fires(settings: Sequence[AlertSettings], schedule: Schedule) -> list[BadConfig]:
    """Why declared alerts could never go off in a run of this schedule; those of every run are spared."""
    if tuple(settings) == DEFAULT_ALERTS:
        return []
    return [
        BadConfig(f"alerts: {one.metric} {one.when} {why}") for one in settings for why in _obstacles(one, schedule)
    ]


def _obstacles(one: AlertSettings, schedule: Schedule) -> Iterator[str]:
    needed = one.steps + (HISTORY_STEPS if one.when in ("spike", "drop") else 0)
    if needed > schedule.total_steps:
        yield f"needs {needed} steps and the run has {schedule.total_steps}; lower its steps or remove it"
    if (one.metric, one.when) == ("learning_rate", "above") and one.value >= schedule.peak:
        yield f"{one.value:g} never goes off: the rate is at most {schedule.peak:g}; lower it or remove it"
