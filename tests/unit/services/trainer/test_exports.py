"""Exports: what TensorBoard and MLflow read back is what the run wrote down, and neither holds a training up."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.trainer.settings.exports import ExportSettings
from services.trainer.settings.training import TrainSettings, parse_settings
from services.trainer.tracking import exports
from services.trainer.tracking.exports import Exports, Mlflow, TensorBoard, open_exports, refusals
from smeltkit import limits
from smeltkit.errors import BadConfig, NotBuilt, UnsupportedOption
from smeltkit.testing.exports import scalars_of

JOB = "job-1"
NAMES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_share", "mfu", "memory_bytes", "tokens")


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where MLflow's own library keeps runs without a server."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlflow").as_uri()


@pytest.fixture
def client(uri: str) -> Any:
    """MLflow's own, loaded here: that takes seconds, and every process collects every file."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def test_every_number_of_a_step_is_read_back_from_both_tools(tmp_path: Path, uri: str, client: Any) -> None:
    """From files that the tools' own libraries wrote and read; numbers that a step lacks are left out."""
    settings = TrainSettings(export=ExportSettings(tensorboard=True, mlflow="tiny runs"))
    where = {"tensorboard": str(tmp_path / "events"), "mlflow": uri}
    sent = open_exports(settings, {"job_id": JOB, "name": "tiny/a:b", "destinations": where})
    steps = [{"step": n, **{name: n + place / 8 for place, name in enumerate(NAMES)}} for n in (1, 2, 3)]
    for step in [*steps, {"step": 4, "loss": 0.5, "mfu": None}]:
        sent.put(step)
    told = {"steps": 4, "missed": 0, "error": ""}
    assert sent.close(is_finished=True) == {"tensorboard": told, "mlflow": told}
    expected = {name: [(step["step"], step[name]) for step in steps] for name in NAMES}
    expected["loss"].append((4, 0.5))
    assert scalars_of(tmp_path / "events" / JOB / "tiny_a:b") == expected
    (run,) = client.search_runs([client.get_experiment_by_name("tiny runs").experiment_id])
    found = {name: client.get_metric_history(run.info.run_id, name) for name in NAMES}
    assert {name: [(one.step, one.value) for one in series] for name, series in found.items()} == expected
    assert (run.info.run_name, run.info.status, run.data.tags["smelt_job"]) == ("tiny/a:b", "FINISHED", JOB)
    assert run.data.params["method"] == "lora" and "export" not in run.data.params


def test_the_next_attempt_goes_on_in_the_same_run(uri: str, client: Any) -> None:
    """A job that was interrupted is one run at MLflow, whose end is that of the last attempt."""
    for step, is_finished in ((1, False), (2, True)):
        sink = Mlflow(uri, "again", JOB, "tiny:x", {"epochs": 1})
        sink.write([{"step": step, "loss": float(step), "at_s": 1.0}])
        sink.close(is_finished)
        (run,) = client.search_runs([client.get_experiment_by_name("again").experiment_id])
        assert run.info.status == ("FINISHED" if is_finished else "KILLED")
    assert [one.step for one in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]


class Stuck:
    """A tool that takes nothing until it is let go, and then fails if it is told to."""

    def __init__(self, error: str = "") -> None:
        self.go, self.error = threading.Event(), error
        self.taken: list[int] = []

    def write(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Waits."""
        self.go.wait(60)
        if self.error:
            raise OSError(self.error)
        self.taken += [step["step"] for step in steps]

    def close(self, is_finished: bool) -> None:
        """Nothing to end."""


def test_a_slow_tool_misses_steps_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put into a full queue is counted, and told with the outcome."""
    monkeypatch.setattr(limits, "EXPORT_QUEUE_MAX", 2)
    stuck = Stuck()
    both = Exports({"slow": lambda: stuck})
    for step in range(50):
        both.put({"step": step})
    stuck.go.set()
    (told,) = both.close(is_finished=True).values()
    assert told["steps"] == len(stuck.taken) < 50 and told["steps"] + told["missed"] == 50
    assert "too slow" in told["error"]


def test_a_tool_that_fails_takes_no_more_and_says_why() -> None:
    """The training hears nothing of it: neither when a step is put nor at the end."""
    failing = Stuck("no such server")
    failing.go.set()
    both = Exports({"broken": lambda: failing, "missing": lambda: TensorBoard(Path("/proc/nowhere"))})
    for step in range(3):
        both.put({"step": step})
    told = both.close(is_finished=True)
    assert told["broken"] == {"steps": 0, "missed": 3, "error": "OSError: no such server"}
    assert told["missing"]["steps"] == 0 and "/proc/nowhere" in told["missing"]["error"]


def test_a_plan_refuses_what_is_not_set_up_or_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting to make, or the extra to install; what is not asked for needs neither."""
    settings = ExportSettings(tensorboard=True, mlflow="x")
    assert refusals(ExportSettings(), {}) == []
    found = refusals(settings, {"tensorboard": "", "mlflow": ""})
    assert [type(error) for error in found] == [UnsupportedOption] * 2
    assert "SMELT_TRAINER_TENSORBOARD_DIR" in found[0].message and "SMELT_TRAINER_MLFLOW_URI" in found[1].message
    where = {"tensorboard": "/tmp", "mlflow": "http://localhost"}
    assert refusals(settings, where) == []
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    missing = refusals(settings, where)
    assert [type(error) for error in missing] == [NotBuilt] * 2
    assert "pip install 'smelt[tensorboard]'" in missing[0].message


def test_an_experiment_is_a_name_and_no_address() -> None:
    with pytest.raises(BadConfig, match="export.mlflow"):
        parse_settings(json.dumps({"export": {"mlflow": "a\nb"}}))
    with pytest.raises(BadConfig, match="did you mean export.mlflow"):
        parse_settings(json.dumps({"export": {"mlflo": "a"}}))
