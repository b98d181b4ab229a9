"""What is done with trainings, their runs and the GPUs that they take."""

from __future__ import annotations

import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from tests.e2e.conftest import Smelt
from tests.e2e.verb_cases import SUITE, case


@case("train plan")
def train_plan(smelt: Smelt, _: Any, folder: Path) -> None:
    plan = smelt("train", "plan", str(folder / "training" / "training.yaml"))
    assert plan["memory_bytes"] > 0 and "number after 0 is 1." in str(plan["items"])
    assert "ore-11m:taught" not in [model["name"] for model in smelt("models")["models"]]


@case("train apply")
def train_apply(smelt: Smelt, _: Any, folder: Path) -> None:
    made = smelt("train", "apply", str(folder / "training" / "training.yaml"))
    assert made["artifact"]["digest"] == smelt("inspect", "ore-11m:taught")["artifact"]["digest"]
    (score,) = smelt("eval", *SUITE, "--limit", "2", "ore-11m:taught")["scores"]
    assert score["problems"] == 2, "weights that began at random generate, and are scored like any others"


@case("train watch")
def train_watch(smelt: Smelt, _: Any, folder: Path) -> None:
    job_id = smelt("train", "apply", str(folder / "training" / "training.yaml"), "--no-wait")["id"]
    watched = smelt("train", "watch", job_id)
    assert (watched["job"]["id"], watched["job"]["state"]) == (job_id, "succeeded")
    assert watched["run"]["outcome"]["tokens"] == watched["run"]["forecast"]["tokens"] > 0


@case("train sweep")
def train_sweep(smelt: Smelt, swept: dict[str, Any], folder: Path) -> None:
    planned = smelt("train", "sweep", str(folder / "training" / "sweep.yaml"), "--plan")["runs"]
    assert [run["settings"] for run in planned] == [{"learning_rate": 1e-2}, {"learning_rate": 2e-2}]
    assert all(run["plan"]["memory_bytes"] > 0 and run["plan"]["cached_digest"] for run in planned)
    losses = {run["name"]: run["heldout"]["after"] for run in swept["runs"]}
    assert set(losses) == {"ore-11m:swept-01", "ore-11m:swept-02"} and losses[swept["best"]] == min(losses.values())
    best = next(run["digest"] for run in swept["runs"] if run["name"] == swept["best"])
    assert smelt("inspect", "ore-11m:swept")["artifact"]["digest"] == best


@case("train archive")
def train_archive(smelt: Smelt, swept: dict[str, Any], folder: Path) -> None:
    made = smelt("train", "archive", "ore-11m:swept", str(folder / "swept.tar"))
    with tarfile.open(folder / "swept.tar") as archive:
        archive.extractall(folder / "out", filter="data")
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder / "out").returncode == 0
    assert json.loads((folder / "out" / "run.json").read_text())["digest"] == made["run"]
    assert {"model/model.safetensors", "model/tokenizer.json", "metrics.jsonl"} <= set(made["files"])
    assert made["bundle"] in [run["digest"] for run in swept["runs"]]


@case("monitor")
def monitor(smelt: Smelt, *_: Any) -> None:
    found = smelt("monitor", "--once")
    assert found["jobs"] == [] and found["leases"] == [] and found["at"].endswith("Z")


@case("gpus")
def gpus(smelt: Smelt, *_: Any) -> None:
    found = smelt("gpus")
    assert found["leases"] == [] and all(gpu["total_bytes"] > 0 for gpu in found["gpus"])


@case("runs ls")
def runs_ls(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = {run["bundle"]: run for run in smelt("runs", "ls")["runs"]}
    for run in swept["runs"]:
        assert found[run["digest"]]["steps"] == 20 and found[run["digest"]]["heldout"] == run["heldout"]


@case("runs show")
def runs_show(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = smelt("runs", "show", swept["best"])
    assert [step["step"] for step in found["curve"]] == list(range(1, 21))
    assert found["loss"] == {"first": found["curve"][0]["loss"], "last": found["curve"][-1]["loss"]}
    assert found["mfu"] > 0 and found["tokens_per_second"] > 0 and found["outcome"]["tokens"] > 0
    assert smelt.run("runs", "show", "ore-11m").returncode == 3, "an imported model has no run"


@case("runs diff")
def runs_diff(smelt: Smelt, swept: dict[str, Any], _: Path) -> None:
    found = smelt("runs", "diff", *(run["name"] for run in swept["runs"]))
    assert found["settings"] == {"learning_rate": [1e-2, 2e-2]} and not found["inputs"]
    assert found["is_same_training_data"] and found["is_same_heldout_data"]
    assert found["outcomes"]["heldout"][0] == swept["runs"][0]["heldout"]
