"""Alerts: each kind is fed the bad series that it watches for; what could never go off is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from training_files import prepared_from

from services.trainer.optim.schedule import Schedule
from services.trainer.parallel.launch import TrainingProcesses, preparing, tell_preparing
from services.trainer.run.spikes import HISTORY_STEPS
from services.trainer.settings.alerts import DEFAULT_ALERTS, AlertSettings
from services.trainer.settings.training import TrainSettings, parse_settings
from services.trainer.tracking.alerts import Alerts, Silence, never_fires
from services.trainer.tracking.follow import Followed
from services.trainer.tracking.tail import Course, Tail
from services.trainer.work import plain
from smeltkit import limits
from smeltkit.errors import BadConfig

GOOD = {
    "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1000.0, "memory_share": 0.5, "mfu": 0.4,
}  # fmt: skip
CALM = HISTORY_STEPS + 5
"""Good steps before the bad ones."""


def series(bad: Mapping[str, float], count: int = 1) -> list[dict[str, Any]]:
    """A calm run, a little uneven, and then `count` steps that are as `bad` says."""
    steps: list[dict[str, Any]] = [
        {"step": n, **{key: value * (1 + n % 3 / 100) for key, value in GOOD.items()}} for n in range(1, CALM + 1)
    ]
    return steps + [{"step": CALM + n, **GOOD, **bad} for n in range(1, count + 1)]


def fired(alert: AlertSettings, steps: Sequence[Mapping[str, Any]]) -> list[tuple[int, float | None]]:
    """The steps at which an alert goes off, and what was measured."""
    alerts = Alerts([alert])
    return [(found.step, found.measured) for step in steps for found in alerts.judge(step)]


BAD: dict[str, tuple[dict[str, Any], dict[str, float], int]] = {
    "loss too high": ({"metric": "loss", "when": "above", "value": 10.0}, {"loss": 11.0}, 1),
    "loss leaves its course": ({"metric": "loss", "when": "spike", "value": 6.0}, {"loss": 3.0}, 1),
    "loss stands still": ({"metric": "loss", "when": "constant", "steps": 4}, {"loss": 2.5}, 4),
    "loss suspiciously low": ({"metric": "loss", "when": "below", "value": 0.1}, {"loss": 0.01}, 1),
    "gradient too large": ({"metric": "grad_norm", "when": "above", "value": 5.0, "steps": 3}, {"grad_norm": 9.0}, 3),
    "gradient leaves its course": ({"metric": "grad_norm", "when": "spike", "value": 10.0}, {"grad_norm": 2.0}, 1),
    "throughput falls": (
        {"metric": "tokens_per_second", "when": "drop", "value": 0.5, "steps": 5}, {"tokens_per_second": 400.0}, 5,
    ),
    "memory near its end": ({"metric": "memory_share", "when": "above", "value": 0.95}, {"memory_share": 0.96}, 1),
    "device hardly used": ({"metric": "mfu", "when": "below", "value": 0.1}, {"mfu": 0.05}, 1),
    "rate gone": ({"metric": "learning_rate", "when": "below", "value": 1e-6}, {"learning_rate": 0.0}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_alert_goes_off_at_the_bad_steps_and_at_no_good_one(name: str) -> None:
    """R-010: the bad series sets it off once, at the last of as many steps in a row as it wants."""
    settings, bad, count = BAD[name]
    alert = AlertSettings(**settings)
    assert fired(alert, series({})) == []
    assert fired(alert, series(bad, count - 1)) == []
    assert [step for step, _ in fired(alert, series(bad, count + 9))] == [CALM + count]
    twice = [*series(bad, count + 60), *series({}), *series(bad, count)]
    assert len(fired(alert, twice)) == 2, "once more after it was over; what is bad never becomes the course"


@pytest.mark.parametrize("metric", GOOD)
def test_a_metric_that_is_no_number_sets_off_every_alert_on_it(metric: str) -> None:
    """R-010: NaN and infinity, whatever the bound and however many steps it wants."""
    for value in (math.nan, math.inf, -math.inf):
        alert = AlertSettings(metric=metric, when="below", value=1e-9, steps=100)
        assert fired(alert, series({metric: value}, 3)) == [(CALM + 1, None)]


def test_every_kind_and_every_default_is_fed_a_bad_series() -> None:
    """R-010: a kind or a default that is added later needs one as well."""
    told = {settings["when"] for settings, _, _ in BAD.values()}
    with pytest.raises(BadConfig) as error:
        AlertSettings(metric="loss", when="x")
    assert {"silent", *told} == set(error.value.message.rpartition("one of ")[2].split(", "))
    for alert in DEFAULT_ALERTS[:-1]:
        bad = {"above": 1e9, "spike": GOOD[alert.metric] * 3, "constant": GOOD[alert.metric], "drop": 1e-9}[alert.when]
        assert len(fired(alert, series({alert.metric: bad}, alert.steps))) == 1, alert
    assert DEFAULT_ALERTS[-1].when == "silent"


def test_silence_is_told_once_until_a_step_comes_again() -> None:
    """R-010: a training that hangs makes no step to judge, so the clock does."""
    silence = Silence([AlertSettings(metric="step", when="silent", value=bound) for bound in (60.0, 600.0)], 0.0)
    assert silence.judge(0, 59.0) == []
    assert [alert.message for alert in silence.judge(7, 61.0)] == ["step 7: none for 60 s"]
    assert silence.judge(7, 599.0) == []
    assert [alert.measured for alert in silence.judge(7, 601.0)] == [600.0]
    silence.heard(602.0)
    assert silence.judge(8, 603.0) == [] and len(silence.judge(8, 1500.0)) == 2


@pytest.mark.parametrize(
    ("alert", "why"),
    [
        ({"metric": "los", "when": "above", "value": 10}, "must be one of loss"),
        ({"metric": "loss", "when": "over", "value": 10}, "must be one of above"),
        ({"metric": "loss", "when": "below", "value": 0}, "never goes off"),
        ({"metric": "memory_share", "when": "above", "value": 1}, "never goes off"),
        ({"metric": "mfu", "when": "below", "value": 1.5}, "never goes off"),
        ({"metric": "loss", "when": "drop", "value": 1.5}, "must be 0.01 to 0.99"),
        ({"metric": "loss", "when": "spike"}, "must be 1 to 100"),
        ({"metric": "loss", "when": "constant"}, "must be 2 to"),
        ({"metric": "loss", "when": "constant", "steps": 5, "value": 1}, "must be 0 to 0"),
        ({"metric": "loss", "when": "silent", "value": 5}, "silent is for the metric step"),
        ({"metric": "step", "when": "above", "value": 5}, "silent is for the metric step"),
        ({"metric": "loss", "bound": 5}, r"alerts\[0\].bound is no setting"),
        ({}, "metric='' must be one of"),
    ],
)
def test_an_alert_that_cannot_be_meant_is_refused(alert: dict[str, Any], why: str) -> None:
    """R-010: unknown metrics and kinds, and bounds that nothing can cross, with what is allowed."""
    with pytest.raises(BadConfig, match=why):
        parse_settings(json.dumps({"alerts": [alert]}))


def test_an_alert_that_cannot_go_off_in_this_run_is_refused_by_its_plan(tmp_path: Path) -> None:
    """R-010: a run shorter than what an alert needs, a rate that the schedule never has; a possible one passes."""
    found = prepared_from(
        tmp_path,
        max_steps=10,
        alerts=[
            {"metric": "loss", "when": "spike", "value": 6},
            {"metric": "loss", "when": "above", "value": 10, "steps": 11},
            {"metric": "learning_rate", "when": "above", "value": "1e-3"},
            {"metric": "loss", "when": "above", "value": 10, "steps": 10},
        ],
    )
    assert [refusal.message.split(";")[0] for refusal in found.refusals] == [
        "alerts: loss spike needs 26 steps and the run has 10",
        "alerts: loss above needs 11 steps and the run has 10",
        "alerts: learning_rate above 0.001 never goes off: the rate is at most 0.001",
    ]
    assert prepared_from(tmp_path, max_steps=10).refusals == (), "what every run is watched for is no such claim"


class Heard:
    """Takes down what is told of a training."""

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.stages: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.messages: list[str] = []
        self.measured: list[tuple[Mapping[str, float], str]] = []
        self.steps: list[int] = []

    def phase(self, name: str, total: int, unit: str = "", message: Callable[[], str] | None = None) -> Any:
        """Takes down the line for people; how far phases are is not looked at."""
        return lambda done: self.messages.append(message() if message else "")

    def measure(
        self, measured: Mapping[str, float], course: Sequence[float], *, alert: str = "", note: str = ""
    ) -> None:
        """What progress is told."""
        self.measured.append((measured, alert))
        self.notes += [note] if note else []

    def tell(self, step: Mapping[str, Any]) -> None:
        """What is told of steps."""
        self.steps.append(step["step"])

    def enter(self, stage: Mapping[str, Any], name: str = "") -> None:
        """What is told of stages."""
        self.stages.append((name, stage["stage"]))

    def alert(self, alert: Mapping[str, Any], name: str = "") -> None:
        """What is told of alerts."""
        self.alerts.append((name, alert["message"]))


def line(step: int, *alerts: str, **more: Any) -> dict[str, Any]:
    """A step as a training writes it down."""
    told = [{"message": text, "when": "above"} for text in alerts]
    return {
        "step": step,
        "steps": 9,
        "loss": 2.0,
        "tokens": 3 * step,
        "tokens_per_second": 1.0,
        **({"alerts": told} if told else {}),
        **more,
    }


def test_every_alert_is_told_once_also_between_two_looks() -> None:
    """R-010: to the run's stream and to its progress; lines that are read again are not told again."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard)
    followed.hear([line(1, "a"), line(2, "b", name="one"), line(3)])
    followed.hear([line(1, "a"), line(2, "b", name="one"), line(3), line(4, "c")])
    assert heard.alerts == [("", "a"), ("one", "b"), ("", "c")] and heard.steps == [3, 4]
    assert [alert for _, alert in heard.measured if alert] == ["a", "one: b", "c"]
    assert heard.measured[-1][0]["loss"] == 2.0


def test_every_stage_is_told_once() -> None:
    """To the run's stream and, as a note, to its progress; of several adapters with the name."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard)
    entered = {"stage": 2, "message": "stage 2 of 2 begins"}
    for _ in range(2):
        followed.hear([line(1), line(2, entered=entered, name="one"), line(3, entered=entered)])
    assert heard.stages == [("one", 2), ("", 2)] and heard.alerts == []
    assert heard.notes == ["one: stage 2 of 2 begins", "stage 2 of 2 begins"]


def test_a_run_that_diverges_sets_off_an_alert_with_its_error() -> None:
    """R-010: a loss that is not finite ends the run before its step is written; who follows it tells."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard)
    followed.hear([line(5)])
    followed.end({"reason": "TRAINING_DIVERGED", "message": "loss nan"})
    followed.end({"runs": [{"reason": "OUT_OF_MEMORY", "message": "x"}, {"heldout": None}]})
    assert heard.alerts == [("", "step 5: loss nan")]
    assert [alert["when"] for alert in followed.noticed] == ["diverged"]


def test_processes_that_begin_again_set_off_an_alert_each_time() -> None:
    """R-010: the run goes on, and whoever follows it knows what it lost."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard)
    followed.hear([line(5)])
    followed.restarted([{"message": "one was killed"}])
    assert heard.alerts == [("", "step 5: one was killed")]
    assert [(alert["metric"], alert["when"]) for alert in followed.noticed] == [("process", "lost")]


def test_the_time_left_is_that_of_the_newest_steps_by_their_own_numbers() -> None:
    """Nothing before two steps are known; lines that come in bulk, or again after a kill, change no pace."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard)
    followed.hear([line(1)])
    assert heard.messages[-1] == "loss 2.0000  1 tokens/s"
    followed.hear([line(step) for step in range(2, 8)])
    assert heard.messages[-1] == "loss 2.0000  1 tokens/s  6 s left"
    followed.hear([line(step) for step in range(1, 6)])
    assert heard.messages[-1] == "loss 2.0000  1 tokens/s  12 s left"
    several = Followed([TrainSettings()], heard, heard)
    several.hear([line(1, tokens=4, name="a"), line(2, tokens=900, name="b"), line(3, tokens=8, name="a")])
    assert heard.messages[-1] == "loss 2.0000  1 tokens/s  24 s left"


def test_what_a_training_does_before_its_first_step_is_told_with_how_long_it_takes(tmp_path: Path) -> None:
    """It says so itself; of one that was started again nothing that an earlier one said, and nothing after a step."""
    heard = Heard()
    followed = Followed([TrainSettings()], heard, heard, lambda: preparing(tmp_path))
    followed.hear([])
    tell_preparing(tmp_path, "measures the pace of a step")
    followed.hear([])
    followed.hear([line(1)])
    assert heard.messages == ["", "measures the pace of a step, for 0 s", "loss 2.0000  1 tokens/s"]
    group = TrainingProcesses("no_module", tmp_path, 1)
    group.stop()
    assert preparing(tmp_path) == ""


def test_lines_are_read_once_and_anew_where_the_file_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.read() == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert tail.read() == [{"a": 3}] and tail.read() == []
    path.write_text('{"a": 1}\n')
    assert tail.read() == [{"a": 1}]


def test_a_course_keeps_its_shape_in_few_points() -> None:
    """Means of equal parts, the last one of what there is so far."""
    course = Course()
    for value in range(limits.COURSE_POINTS_MAX * 2 + 1):
        course.add(value + 1, float(value))
    assert course.points[:2] == [1.5, 5.5] and course.points[-1] == limits.COURSE_POINTS_MAX * 2
    assert len(course.points) <= limits.COURSE_POINTS_MAX
    assert Course().points == []


def test_a_course_holds_each_step_once() -> None:
    """Steps that are done again, or whose lines are read again, take the place of what they were."""
    course = Course()
    for step in (5, 6, 7, 8, 7, 8, 9):
        course.add(step, float(step))
    assert course.points == [5.0, 6.0, 7.0, 8.0, 9.0]
    course.add(5, 1.0)
    assert course.points == [1.0]
    first, other = Course(), Course()
    steps = range(1, limits.COURSE_POINTS_MAX * 3)
    for step in [*steps, *steps]:
        first.add(step, float(step))
    for step in steps:
        other.add(step, float(step))
    assert first.points == other.points
    for step in range(30, steps[-1] + 1):
        first.add(step, float(step))
    assert len(first.points) == len(other.points) and first.points[8:] == other.points[8:]
    assert first.points == pytest.approx(other.points, abs=1.5)


def test_alerts_are_no_part_of_what_is_trained() -> None:
    """Whoever watches for something else gets the same bundle."""
    watched = TrainSettings(alerts=(AlertSettings(metric="loss", when="above", value=10.0),))
    assert plain(watched) == plain(TrainSettings()) and "alerts" not in plain(watched)


def test_defaults_are_possible_in_any_schedule_long_enough() -> None:
    schedule = Schedule(kind="constant", peak=1e-3, warmup_steps=0, total_steps=100, final_share=1.0)
    assert never_fires([*DEFAULT_ALERTS, DEFAULT_ALERTS[0]], schedule) == []
