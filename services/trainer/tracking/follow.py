"""A training followed to its end by the service that started it: its steps, stages and alerts, and its outcome."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Protocol

from services.trainer.parallel.groups import LOOPBACK, RESTARTS_FILE
from services.trainer.parallel.launch import TrainingProcesses, preparing
from services.trainer.settings.training import TrainSettings
from services.trainer.tracking.alerts import Alert, Silence, of_outcome, of_restart
from services.trainer.tracking.records import METRICS_FILE
from services.trainer.tracking.tail import Course, Tail
from smeltkit import limits
from smeltkit.gpus.ledger import Lease

Tell = Callable[[int], None]
_MEASURED: Final[tuple[str, ...]] = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "tokens",
    "memory_bytes",
    "mfu",
    "heldout",
)
"""What progress tells of the newest step."""
_STEPS_TIMED: Final = 32
"""Newest steps whose mean time says how long those that are left take."""


class Phases(Protocol):
    """Gives the function that tells how much of a named phase is done; it may raise to stop the work."""

    def phase(self, name: str, total: int, unit: str = "bytes", message: Callable[[], str] | None = None) -> Tell:
        """`message` is asked for a line for people whenever progress is told."""

    def measure(
        self, measured: Mapping[str, float], course: Sequence[float], *, alert: str = "", note: str = ""
    ) -> None:
        """Tells the newest numbers, the course of the loss, and an alert or what else happened, if anything did."""


class Told(Protocol):
    """Whoever hears of steps, stages and alerts as they come."""

    def tell(self, step: Mapping[str, Any]) -> None:
        """A step, as it was written; not every one."""

    def alert(self, alert: Mapping[str, Any], name: str = "") -> None:
        """An alert that went off, of the adapter `name` where several are trained together."""

    def enter(self, stage: Mapping[str, Any], name: str = "") -> None:
        """A stage that followed upon another, likewise."""


class Followed:
    """What is known of a training under way, from the lines that it writes; told on as they come."""

    def __init__(
        self, settings: Sequence[TrainSettings], phases: Phases, told: Told, preparing: Callable[[], str] = str
    ) -> None:
        """`preparing` tells what the training is about before its first step."""
        self._phases, self._told, self._preparing = phases, told, preparing
        self._silence = Silence([alert for one in settings for alert in one.alerts], time.monotonic())
        self._course, self._seen = Course(), set[tuple[str, str]]()
        self._tell = phases.phase("prepare", 0, "steps", self._message)
        self._tokens, self._steps_s = dict[str, int](), deque[float](maxlen=_STEPS_TIMED)
        self._until_step = settings[0].until_step if len(settings) == 1 else 0
        self._newest: dict[str, Any] = {}
        self._heldout: dict[str, Any] = {}
        self.noticed: list[dict[str, Any]] = []
        """Alerts that the training itself did not write down."""

    def hear(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Takes in the steps that are new, and tells how far the training is."""
        for step in steps:
            self._course.add(step["step"], step["loss"])
            self._time(step)
            if "entered" in step:
                self._enter(step["entered"], step.get("name", ""))
            self._heldout |= {key: step[key] for key in ("heldout", "outlook") if key in step}
            for alert in step.get("alerts", ()):
                self._alert(alert, step.get("name", ""))
        if steps:
            self._move(dict(steps[-1]))
        self._notice(self._silence.judge(self._newest.get("step", 0), time.monotonic()))
        self._tell(self._newest.get("step", 0))

    def restarted(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Takes in that all processes were started again, which whoever follows hears of as an alert."""
        step = self._newest.get("step", 0)
        self._notice([of_restart(step, line["message"]) for line in lines])

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Takes in how the training ended."""
        for each in outcome.get("runs", [outcome]):
            self._notice(of_outcome(self._newest.get("step", 0), each))

    def _time(self, step: Mapping[str, Any]) -> None:
        """Takes in how long a step took, by its own numbers: lines are read in bulk, and again."""
        tokens, name = step["tokens"], step.get("name", "")
        if tokens > self._tokens.get(name, tokens):
            self._steps_s.append((tokens - self._tokens[name]) / step["tokens_per_second"])
        self._tokens[name] = tokens

    def _move(self, newest: dict[str, Any]) -> None:
        if not self._newest:
            self._tell = self._phases.phase("train", self._end_of(newest), "steps", self._message)
        self._newest = newest
        self._silence.heard(time.monotonic())
        self._measure()
        self._told.tell(newest)

    def _notice(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self.noticed.append(alert.to_dict())
            self._alert(alert.to_dict(), "")

    def _enter(self, stage: Mapping[str, Any], name: str) -> None:
        text = _named(stage["message"], name)
        if self._is_new(text, "stage"):
            self._measure(note=text)
            self._told.enter(stage, name)

    def _alert(self, alert: Mapping[str, Any], name: str) -> None:
        text = _named(alert["message"], name)
        if self._is_new(text, alert["when"]):
            self._measure(alert=text)
            self._told.alert(alert, name)

    def _is_new(self, text: str, what: str) -> bool:
        """Whether it is told for the first time: a line may be read again."""
        is_new = (text, what) not in self._seen
        self._seen.add((text, what))
        return is_new

    def _measure(self, *, alert: str = "", note: str = "") -> None:
        known = {**self._newest, **self._heldout}
        measured = {key: float(known[key]) for key in _MEASURED if key in known}
        self._phases.measure(measured, self._course.points, alert=alert, note=note)

    def _message(self) -> str:
        if not self._newest:
            return self._preparing()
        loss, rate = self._newest["loss"], self._newest["tokens_per_second"]
        heldout = f"  held-out {self._heldout['heldout']:.4f}" if self._heldout else ""
        outlook = f"  {self._heldout['outlook']}" if "outlook" in self._heldout else ""
        steps_left = self._end_of(self._newest) - self._newest["step"]
        left = f"  {fmean(self._steps_s) * steps_left:.0f} s left" if self._steps_s else ""
        return f"loss {loss:.4f}{heldout}  {rate:.0f} tokens/s{left}{outlook}"

    def _end_of(self, step: Mapping[str, Any]) -> int:
        """The step that the training ends or pauses at."""
        return int(self._until_step or step["steps"])


def _named(message: str, name: str) -> str:
    """A line about the adapter `name`, if it is about one of several."""
    return f"{name}: {message}" if name else message


def follow(
    module: str, folder: Path, phases: Phases, told: Told, settings: Sequence[TrainSettings], *, lease: Lease,
    address: str = LOOPBACK,
) -> dict[str, Any]:  # fmt: skip
    """Runs a training, by the name of its module, on the GPUs of `lease` to its end; what it left as outcome.

    `settings` are those of the training, or of each of several adapters; its machines, if there are others, meet at
    `address`. The outcome's `alerts` are those that only who follows can notice: that its processes were started again,
    that no step came any more, or that the run diverged.
    """
    tail, restarts = Tail(folder / METRICS_FILE), Tail(folder / RESTARTS_FILE)
    followed, first = Followed(settings, phases, told, lambda: preparing(folder)), settings[0]
    training = TrainingProcesses(module, folder, first.processes, lease, nodes=first.nodes, address=address)
    try:
        while training.are_running():
            time.sleep(limits.TRAIN_POLL_S)
            followed.restarted(restarts.read())
            followed.hear(tail.read())
    finally:
        training.stop()
    outcome = training.outcome()
    followed.restarted(restarts.read())
    followed.hear(tail.read())
    followed.end(outcome)
    return {**outcome, "alerts": followed.noticed}
