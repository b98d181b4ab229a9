"""Trainings on several machines: the numbers of one process, processes that are lost, machines that never come."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_files import DEADLINE_S, children_of, steps_of, wait_for_end, write_spec

from services.trainer.checkpoints import checkpoint
from services.trainer.config import TrainerConfig
from services.trainer.parallel.groups import RESTARTS_FILE
from services.trainer.parallel.launch import TrainingProcesses
from services.trainer.parallel.places import Place
from services.trainer.run.measured import read_course
from services.trainer.train_process import train
from smeltkit.errors import BadConfig
from smeltkit.ml.bundle import files_of

HERE = Path(__file__).parent
KEPT = 100


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _all_but_random(folder: Path) -> dict[str, torch.Tensor]:
    _, tensors = checkpoint.read(folder)
    return {name: value for name, value in tensors.items() if not name.startswith(checkpoint.RANDOM)}


def test_two_machines_train_as_one_process_does_though_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-067, R-056, R-057: from a checkpoint of one process two machines go on, one is killed, both begin again at the
    checkpoint that they wrote, and one goes on alone from there: the losses, samples and weights of a run of one, its
    held-out losses on the way, and so its best step."""
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda flag: None)
    settings = {"keep_checkpoints": KEPT, "heldout_steps": 3, "early_stop": {"steps": 2, "patience": 3}}
    expected = train(tmp_path / "1", write_spec(tmp_path, "1", is_measured=True, **settings))
    one, folder, port = steps_of(tmp_path / "1"), tmp_path / "2", _free_port()
    write_spec(tmp_path, "2", is_measured=True, **settings, processes=2, nodes=2)
    shutil.copytree(tmp_path / "1" / "checkpoints" / "step-00000004", folder / "checkpoints" / "step-00000004")
    lines = (tmp_path / "1" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    shutil.copy(tmp_path / "1" / "heldout.jsonl", folder)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    training = TrainingProcesses("train_process", folder, 2, nodes=2, address=f"127.0.0.1:{port}")
    names = {**os.environ, "SMELT_NODE_RUNS_DIR": str(tmp_path), "SMELT_NODE_ADDRESS": "127.0.0.1"}
    other = subprocess.Popen([sys.executable, "-m", "services.trainer.parallel.node"], env=names)
    while len(steps_of(folder)) < len(one) // 2:
        assert training.are_running(), (folder / "log.txt").read_text()
        time.sleep(0.02)
    (victim,) = children_of(other.pid)
    os.kill(victim, signal.SIGKILL)
    wait_for_end(training)
    found = training.outcome()
    assert "reason" not in found, found
    assert other.wait(DEADLINE_S) == 0
    assert len((folder / RESTARTS_FILE).read_text().splitlines()) == 1
    assert found["cost"]["tokens"] == expected["cost"]["tokens"]
    last = f"step-{len(one):08d}"
    for path in (folder / "checkpoints" / last, folder / "bundle"):
        shutil.move(path, tmp_path / f"two-{path.name}")
    courses = [read_course(tmp_path / name / "heldout.jsonl") for name in ("1", "2")]
    assert [one.step for one in courses[1]] == [one.step for one in courses[0]] and len(courses[0]) > len(one) // 2
    for alone, shared in zip(*courses, strict=True):
        assert shared.losses == pytest.approx(alone.losses, rel=1e-5) and shared.tokens == alone.tokens
    assert found["best"] == expected["best"]
    train(folder, write_spec(tmp_path, "alone", is_measured=True, **settings))
    two = steps_of(folder)
    assert [step["sample_ids"] for step in one] == [step["sample_ids"] for step in two]
    for key in ("loss", "grad_norm", "counted", "tokens"):
        assert [step[key] for step in two] == pytest.approx([step[key] for step in one], rel=1e-5), key
    state = _all_but_random(tmp_path / "1" / "checkpoints" / last)
    for path in (tmp_path / f"two-{last}", folder / "checkpoints" / last):
        torch.testing.assert_close(_all_but_random(path), state, rtol=1e-4, atol=1e-5)
    files = [[path.name for path in files_of(each)] for each in (tmp_path / "1" / "bundle", tmp_path / "two-bundle")]
    assert files[0] == files[1]


def test_how_a_group_ends_is_told(tmp_path: Path) -> None:
    """A machine that never comes is a typed error within a bound, and so is a process that is lost once too often; one
    that has told its own error is not started again."""
    command = [sys.executable, str(HERE / "group_ends.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{Path.cwd()}"}
    subprocess.run(command, env=environment, check=True, timeout=DEADLINE_S)
    told = {folder.name: [json.loads(path.read_text()) for path in folder.glob("outcome*.json")]
            for folder in tmp_path.iterdir()}  # fmt: skip
    assert [(each["reason"], each["message"]) for name in ("alone", "lost") for each in told[name]] == [
        ("TIMEOUT", "1 of 2 machines came within 3 s to train together; start the others, or lower nodes"),
        ("PROCESS_LOST", "process 1 of 2 was killed by signal 9, after 1 restarts; the job goes on from its last"
         " checkpoint"),
    ]  # fmt: skip
    assert (tmp_path / "lost" / RESTARTS_FILE).read_text().splitlines() == [
        '{"message": "process 1 of 2 was killed by signal 9; all go on from the last checkpoint, 0 restarts are left"}'
    ]
    assert [each["reason"] for each in told["diverged"]] == ["TRAINING_DIVERGED"]
    assert not (tmp_path / "diverged" / RESTARTS_FILE).exists()


def test_processes_that_do_not_fit_the_settings_are_refused() -> None:
    """As many must be started as the settings say, and machines meet at a port that they know."""
    with pytest.raises(BadConfig, match="processes=4, but 2 were started; set it to 2, or start 4"):
        Place(rank=1, count=2).check(4)
    with pytest.raises(BadConfig, match="with nodes=2 a certain port"):
        TrainerConfig(inference_address="i:1", nodes=2)
