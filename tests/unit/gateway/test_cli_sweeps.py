"""Sweeps and runs without a platform: which runs a file means, and how they are shown."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import typer
from rich.console import Console
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.commands import train
from gateway.cli.curves import curves_document, curves_view
from gateway.cli.output import Output
from gateway.cli.runs_view import diff_document, diff_views, flat, run_views, runs_view, sparkline
from gateway.cli.sweeps import points_of, run_of
from gateway.cli.training_file import files_of, merged, trainings
from smeltkit.errors import BadConfig, JobCancelled

FILE = Path("training.yaml")
RUN: dict[str, Any] = {
    "digest": "sha256:" + "a" * 64, "bundle": "sha256:" + "b" * 64, "name": "ore:one", "base": "sha256:" + "c" * 64,
    "data": ["sha256:" + "d" * 64, "sha256:" + "e" * 64], "settings": {"method": "lora", "lora": {"rank": 4}},
    "code_revision": "1", "device": "cpu", "steps": 40, "loss": {"first": 2.0, "last": 1.0},
    "heldout": {"before": 2.0, "after": 1.5, "change": -0.5, "low": -0.6, "high": -0.4, "rows": 9},
    "outcome": {"time_s": 12.0, "memory_bytes": 1 << 20, "tokens": 1000}, "tokens_per_second": 83.3, "mfu": 0.31,
    "noise_scale": None, "finished_at": "2026-01-01T00:00:00Z",
}  # fmt: skip

_NOTHING: dict[str, Any] = {"heldout": None, "run": None, "digest": None}


def _shown(*views: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        for view in views:
            console.print(view)
    return captured.get()


def test_a_grid_is_every_combination_in_order() -> None:
    points = points_of({"keys": {"learning_rate": ["1e-4", 0.001], "lora.rank": [4, 8]}})
    assert [tuple(point.values()) for point in points] == [("1e-4", 4), ("1e-4", 8), (0.001, 4), (0.001, 8)]
    run = run_of({"name": "ore:x", "lora": {"alpha": 3}, "sweep": {}}, points[1], 2)
    assert run == {"name": "ore:x-02", "lora": {"alpha": 3, "rank": 8}, "learning_rate": "1e-4"}


def test_a_random_sweep_is_the_same_for_a_seed() -> None:
    """Ranges are drawn within their bounds, whole where these are whole, and no run occurs twice."""
    keys = {"learning_rate": {"low": "1e-5", "high": "1e-2", "log": True}, "epochs": {"low": 1, "high": 3}}
    one, same, other = (points_of({"method": "random", "runs": 9, "seed": s, "keys": keys}) for s in (1, 1, 2))
    assert one == same != other
    assert all(1e-5 <= point["learning_rate"] <= 1e-2 and point["epochs"] in (1, 2, 3) for point in one)
    assert min(point["learning_rate"] for point in one) < 2e-4
    few = points_of({"method": "random", "runs": 20, "keys": {"epochs": {"low": 1, "high": 3}}})
    assert sorted(point["epochs"] for point in few) == [1, 2, 3]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        (None, "must hold keys"),
        ({"keys": {}}, "must hold keys"),
        ({"method": "best", "keys": {"epochs": [1, 2]}}, "grid, random"),
        ({"keys": {"epochs": [1, 2]}, "runs": 3}, "sweep.runs has no effect with method grid"),
        ({"keys": {"epochs": {"low": 1, "high": 2}}}, "ranges are for runs that are drawn"),
        ({"keys": {"epochs": [1]}}, "1 different runs"),
        ({"keys": {"epochs": list(range(40)), "seed": [1, 2]}}, "more than 64"),
        ({"method": "random", "keys": {"epochs": [1, 2]}}, "sweep.runs is missing"),
        ({"method": "random", "runs": 1, "keys": {"epochs": [1, 2]}}, "sweep.runs=1 must be 2 to 64"),
        ({"method": "random", "runs": 2, "keys": {"epochs": {"low": 3, "high": 1}}}, "must be below"),
        ({"method": "random", "runs": 2, "keys": {"epochs": {"low": "x", "high": 1}}}, "no number"),
        ({"method": "random", "runs": 2, "keys": {"epochs": {"from": 3}}}, "low, high"),
        ({"method": "random", "runs": 2, "keys": {"epochs": {"low": 0, "high": 1, "log": True}}}, "above 0"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep: Any, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        points_of(sweep)


def test_adapters_share_what_they_do_not_say_themselves() -> None:
    adapters = [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl", "lora": {"rank": 8}}]
    value = {"base": "ore", "lora": {"rank": 4, "alpha": 8}, "adapters": adapters}
    one, other = trainings(value, FILE)
    assert (one["lora"], other["lora"]) == ({"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 8})
    assert one["base"] == "ore" and "adapters" not in one
    assert trainings({"base": "ore", "name": "a"}, FILE) == [{"base": "ore", "name": "a"}]
    with pytest.raises(BadConfig, match="two or more"):
        trainings({**value, "adapters": [{"name": "a"}]}, FILE)
    with pytest.raises(BadConfig, match="holds a sweep; use `smelt train sweep training.yaml`"):
        trainings({**value, "sweep": {}}, FILE)
    with pytest.raises(BadConfig, match="name has no effect"):
        trainings({**value, "name": "x"}, FILE)
    assert merged({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


def test_the_data_files_of_a_training_come_stage_by_stage() -> None:
    """What goes to the trainer is files in order and the settings; a mix is how often an epoch passes over each."""
    value = {"base": "ore", "name": "a", "heldout": "h", "epochs": 2}
    assert files_of({**value, "data": "x"}, FILE) == (["x", "h"], {"epochs": 2})
    assert files_of({**value, "data": ["x", "y"]}, FILE) == (["x", "y", "h"], {"epochs": 2, "mix": [1, 1]})
    del value["epochs"]
    stages = [{"data": "x", "epochs": 2}, {"data": {"x": "0.5", "y": 1}, "max_steps": 9}]
    names, settings = files_of({**value, "stages": stages, "seed": 1}, FILE)
    assert names == ["x", "x", "y", "h"]
    assert settings == {"seed": 1, "stages": [{"epochs": 2}, {"max_steps": 9, "mix": ["0.5", 1]}]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "data is missing"),
        ({"data": {}}, "data is missing, or neither a file"),
        ({"data": [1]}, "data is missing, or neither"),
        ({"data": ["x"], "mix": [2]}, "mix is what data says"),
        ({"data": "x", "mix": [2]}, "mix is what data says"),
        ({"stages": [{"data": "x", "mix": [2]}]}, r"stages\[0\].mix is what stages\[0\].data says"),
        ({"data": {"x": -1}}, "training.yaml: data: x: -1 must be how often an epoch passes over it, 1e-06 to 1000"),
        ({"data": {"x": "1e-2", "y": None}}, "data: y: None must be how often"),
        ({"stages": [{"data": {"x": 2000}}]}, r"stages\[0\].data: x: 2000 must be"),
        ({"data": "x", "heldout": ["h"]}, r"heldout=\['h'\] must be one file"),
        ({"data": "x", "heldout": []}, r"heldout=\[\] must be one file"),
        ({"stages": []}, "stages must be a list"),
        ({"stages": ["x"]}, "stages must be a list"),
        ({"stages": [{"data": "x"}, {"epochs": 1}]}, r"stages\[1\].data is missing"),
        ({"stages": [{"data": "x"}], "data": "y"}, "data has no effect beside stages"),
        ({"stages": [{"data": "x", "epochs": 2}], "epochs": 1}, r"epochs is said of the training and in stages\[0\]"),
    ],
)
def test_files_that_name_their_data_wrongly_are_refused(value: dict[str, Any], says: str) -> None:
    """R-006: nothing is passed over, and nothing said twice."""
    with pytest.raises(BadConfig, match=says):
        files_of(value, FILE)


def test_a_run_shows_its_stages() -> None:
    """A line each, with the held-out loss where it ended; runs of other stages were trained on other data."""
    data = [*RUN["data"], "sha256:" + "f" * 64]
    stages = [
        {"data": data[:1], "steps": 30, "tokens": 9000, "loss": {"first": 2.0, "last": 1.4}, "heldout_loss": 1.7},
        {"data": data[1:2], "steps": 10, "tokens": 1000, "loss": {"first": 1.5, "last": 1.0}, "heldout_loss": None},
    ]
    run = {**RUN, "data": data, "stages": stages, "missed": [], "forecast": None, "alerts": [], "exports": {},
           "spikes": {"clipped": 0, "skipped": 0, "rollbacks": 0}}  # fmt: skip
    shown = _shown(*run_views(run, [{"loss": 2.0}]))
    assert f"{data[0]}, {data[1]}" in shown and [line.split()[-1] for line in shown.splitlines()
                                                 if line.startswith("held-out data")] == data[2:]  # fmt: skip
    assert "9,000" in shown and "1.5000 -> 1.0000" in shown and "1.7000" in shown
    course = {"course": [{"loss": 2.0}, {"loss": 1.5}], "outlook": None, "best": {"step": 30, "of": 40}}
    told = " ".join(_shown(*run_views({**run, **course}, [{"loss": 2.0}])).split())
    assert "3 after the first; set heldout_steps" in told
    assert "step 30 of 40 done, where the held-out loss was lowest" in told
    found = diff_document(run, {**RUN, "data": [data[0], data[2]]})
    assert (found["is_same_training_data"], found["is_same_heldout_data"]) == (False, True)


def test_a_sparkline_falls_as_the_loss_falls() -> None:
    line = sparkline([8.0 - n / 100 for n in range(800)], width=8)
    assert len(line) == 8 and list(line) == sorted(line, reverse=True) and len(set(line)) == 8
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == chr(0x2581) * 2


def test_runs_and_their_differences_are_shown_with_their_intervals() -> None:
    """R-122: what was not measured is a dash; held-out losses over other rows are not compared in silence."""
    other = {**RUN, "name": "ore:two", "settings": {"method": "lora", "lora": {"rank": 8}}, "mfu": None,
             "data": [RUN["data"][0]], "heldout": None}  # fmt: skip
    listed = _shown(runs_view([RUN, other]))
    assert "1.5000 (-0.5000 [-0.6000, -0.4000])" in listed and "31.0%" in listed
    assert "145.0%, of a rate that was measured on a busy machine" in _shown(runs_view([{**RUN, "mfu": 1.45}]))
    found = diff_document(RUN, other)
    assert found["settings"] == {"lora.rank": [4, 8]} and found["outcomes"]["mfu"] == [0.31, None]
    assert (found["is_same_training_data"], found["is_same_heldout_data"]) == (True, False)
    shown = _shown(*diff_views(RUN, other))
    assert "lora.rank" in shown and "no held-out data in common" in shown
    assert "nothing that went in differs" in _shown(*diff_views(RUN, RUN))
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_courses_are_shown_on_one_axis_of_tokens_and_one_scale() -> None:
    """R-122: a run that saw half of the tokens ends in the middle; what it has not is n/a, never 0."""
    short = [{"tokens": 50 * n, "loss": 4.0} for n in range(1, 9)]
    long = [{"tokens": 50 * n, "loss": 8.0 - n / 4} for n in range(1, 17)]
    found = curves_document([short, long])
    assert found["tokens"] == [200, 400, 600, 800]
    assert found["losses"] == [[4.0, 4.0, None, None], [7.375, 6.375, 5.375, 4.375]]
    shown = _shown(curves_view(["one", "two"], found)).splitlines()
    assert shown[0].split() == ["loss", "by", "tokens", "seen", "200", "400", "600", "800"]
    assert shown[1].split() == ["one", chr(0x2581) * 2, "4.0000", "4.0000", "n/a", "n/a"]
    assert shown[2].split()[1][0] == chr(0x2588)
    assert curves_document([[], long]) == {"tokens": [], "losses": [[], []]}
    assert "one" in _shown(curves_view(["one", "two"], curves_document([[], long])))


@pytest.mark.parametrize(("error", "named"), [(None, 1), ("job_x was cancelled", 0)])
def test_a_sweep_gives_its_name_only_where_all_runs_ended(
    error: str | None, named: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the best of those that did is told, and the command ends as one of a cancelled job."""
    path, done = tmp_path / "sweep.yaml", {"heldout": RUN["heldout"], "run": RUN, "digest": RUN["bundle"]}
    path.write_text("{name: 'ore:x', heldout: h.jsonl, sweep: {keys: {epochs: [1, 2]}}}")
    rows = [{"name": "ore:x-01", **done}, {"name": "ore:x-02", **(done if not error else {**_NOTHING, "error": error})}]
    specs = [trainer_pb2.TrainSpec(name=row["name"], settings_json="{}") for row in rows]
    session = SimpleNamespace(
        output=Output(False), call=AsyncMock(return_value=trainer_pb2.PlanTrainResponse()), trainer=Mock(),
        artifacts=SimpleNamespace(SetName="SetName"),
    )  # fmt: skip
    monkeypatch.setattr(train, "specs_of", AsyncMock(return_value=specs))
    monkeypatch.setattr(train, "run_all", AsyncMock(return_value=rows))
    monkeypatch.setattr(train, "run", lambda name, work, as_json: asyncio.run(work(session)))
    with pytest.raises(typer.Exit) if error else nullcontext() as ended:
        train.sweep(path, plan=False, vram="", as_json=False)
    told = capsys.readouterr()
    assert [call.args[0] for call in session.call.call_args_list].count("SetName") == named
    if ended:
        assert ended.value.exit_code == JobCancelled.exit_code != 0
        assert "best of 1 of 2" in told.out and "ore:x is not named, since ore:x-02 did not" in told.err
