"""Successive halving without a platform: rungs, what they cost, who is stopped and by which numbers."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.halving import Rung, beside, cost_of, cut, rungs_of, stopped_text
from gateway.cli.sweeps import points_of
from gateway.cli.sweeps_view import sweep_document, sweep_plan_view, sweep_view
from smeltkit.errors import BadConfig


def _shown(*views: Any) -> str:
    console = Console(width=220)
    with console.capture() as captured:
        for view in views:
            console.print(view)
    return captured.get()


def test_each_rung_keeps_one_in_eta_until_one_is_left() -> None:
    """The last is the end; between two rungs steps grow by eta, wherever the first is."""
    assert rungs_of({}, 9, 90) == [
        Rung(steps=10, runs=9, kept=3), Rung(steps=30, runs=3, kept=1), Rung(steps=90, runs=1, kept=1),
    ]  # fmt: skip
    assert rungs_of({"eta": 2, "first_steps": 4}, 6, 18) == [
        Rung(steps=4, runs=6, kept=3), Rung(steps=8, runs=3, kept=1), Rung(steps=18, runs=1, kept=1),
    ]  # fmt: skip
    late = rungs_of({"eta": 2, "first_steps": 40}, 8, 90)
    assert late == [Rung(steps=40, runs=8, kept=4), Rung(steps=80, runs=4, kept=2), Rung(steps=90, runs=2, kept=1)]
    assert rungs_of({}, 2, 2) == [Rung(steps=1, runs=2, kept=1), Rung(steps=2, runs=1, kept=1)]


def test_a_run_that_goes_on_costs_only_its_further_steps() -> None:
    """9 x 10 + 3 x 20 + 1 x 60 steps instead of 9 x 90; time is not told where no run's is known."""
    rungs = rungs_of({}, 9, 90)
    cost = cost_of(rungs, [900] * 9, [30.0] * 6)
    assert (cost.steps, cost.tokens, cost.time_s) == (210, 2100, pytest.approx(70.0))
    assert cost_of(rungs, [900] * 9, []).time_s is None


def test_the_worse_are_stopped_and_told_by_which_numbers() -> None:
    """By the mean; pairs of rows say whether the distance to the last that goes on is noise."""
    rows = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.11], "c": [0.5, 2.9, 3.0], "d": [1.5, 2.51, 3.5]}
    found = cut(rows, 2)
    assert list(found) == ["c", "d"] and {one["against"] for one in found.values()} == {"b"}
    assert found["c"]["is_noise"] and not found["d"]["is_noise"]
    assert found["d"]["change"] == pytest.approx(0.4) and 0 < found["d"]["low"] < 0.4 < found["d"]["high"]
    assert "might as well have gone on" in stopped_text("c", 4, found["c"])
    assert stopped_text("d", 4, found["d"]).startswith("d is stopped after 4 steps: held-out loss 2.5033, +0.4000 [")
    assert beside([1.0, 2.0], [1.0, 2.0])["is_noise"]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({"eta": 1}, "sweep.eta=1 must be a whole number, 2 to 16"),
        ({"eta": 2.5}, "sweep.eta=2.5"),
        ({"first_steps": 90}, "sweep.first_steps=90 must be a whole number, 1 to 89"),
        ({"first_steps": 0}, "sweep.first_steps=0"),
    ],
)
def test_rungs_that_make_no_sense_are_refused(sweep: Any, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        rungs_of(sweep, 9, 90)


def test_runs_of_halving_are_drawn_or_every_combination() -> None:
    keys = {"learning_rate": [1e-4, 1e-3], "lora.rank": [4, 8]}
    assert len(points_of({"method": "halving", "keys": keys, "eta": 2})) == 4
    assert len(points_of({"method": "halving", "runs": 2, "seed": 1, "keys": keys})) == 2
    with pytest.raises(BadConfig, match="sweep.seed has no effect without runs"):
        points_of({"method": "halving", "seed": 1, "keys": keys})
    with pytest.raises(BadConfig, match="sweep.eta has no effect with method grid"):
        points_of({"keys": keys, "eta": 3})


def test_the_plan_of_halving_tells_rungs_and_what_all_take() -> None:
    """The time of a run that is stored in part is that of what is left, so its whole follows from its steps."""
    rungs = rungs_of({"eta": 2}, 2, 10)
    points = [{"seed": 1}, {"seed": 2}]
    plans = [
        job_pb2.Plan(time_s=10.0, counts={"steps": 10, "tokens": 1000}),
        job_pb2.Plan(time_s=5.0, counts={"steps": 10, "tokens": 1000, "steps_stored": 5}),
    ]
    specs = [trainer_pb2.TrainSpec(name=name) for name in ("x-01", "x-02")]
    found = sweep_document(points, specs, plans, rungs)
    assert found["rungs"] == [{"steps": 5, "runs": 2, "kept": 1}, {"steps": 10, "runs": 1, "kept": 1}]
    assert found["cost"] == {"steps": 15, "tokens": 1500, "time_s": 15.0} and found["time_s"] == 15.0
    shown = _shown(*sweep_plan_view(points, specs, plans, rungs))
    assert "15, 75% of those of all runs" in shown and "stored until step 5" in shown


def test_the_table_shows_every_run_with_rung_numbers_and_cost() -> None:
    """Stopped ones after those that were not, failed ones last; what was not measured is a dash."""
    heldout = {"before": 3.0, "after": 2.0, "change": -1.0, "low": -1.2, "high": -0.8, "rows": 9}
    cost = {"time_s": 4.0, "memory_bytes": 1, "tokens": 500}
    stopped = {"loss": 2.5, "against": "x-02", "change": 0.5, "low": -0.1, "high": 1.1, "rows": 9, "is_noise": True}
    rows = [
        {"name": "x-01", "settings": {"seed": 1}, "rung": 1, "steps": 5, "heldout": {**heldout, "after": 2.5},
         "cost": cost, "stopped": stopped, "run": None},
        {"name": "x-02", "settings": {"seed": 2}, "rung": 2, "steps": 10, "heldout": heldout, "cost": cost,
         "run": {"outcome": cost}},
        {"name": "x-03", "settings": {"seed": 3}, "rung": 1, "heldout": None, "run": None, "error": "it diverged"},
    ]  # fmt: skip
    shown = _shown(*sweep_view(rows, rows[1]))
    places = [shown.index(f"x-0{number}  ") for number in (2, 1, 3)]
    assert places == sorted(places)
    assert "stopped beside x-02, within noise" in shown and "it diverged" in shown and "1,000" in shown
    assert "+0.5000 [-0.1000, +1.1000]" in shown and "best of 2 of 3 by held-out loss: x-02" in shown
    assert "best of 2 by held-out loss" in _shown(*sweep_view(rows[:2], rows[1]))
