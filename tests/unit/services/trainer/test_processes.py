"""Trainings that several processes share: the numbers of one process, whole checkpoints, a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training_runs import make_run

from services.trainer import checkpoint, devices
from services.trainer.forecast import Cost
from services.trainer.launch import TrainingProcesses
from services.trainer.memory import checkpoint_bytes, components
from services.trainer.paces import Paces
from services.trainer.plan import Prepared, plan_of, prepare
from services.trainer.ranks import Ranks
from services.trainer.settings import TrainSettings, parse_settings
from services.trainer.train_process import train
from smeltkit.errors import BadConfig, ProcessLost
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.bundle import Bundle, files_of
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

SETTINGS: dict[str, Any] = {
    "method": "full", "sequence_tokens": 64, "packs_per_step": 4, "learning_rate": "1e-3", "checkpoint_steps": 3,
}  # fmt: skip
DEADLINE_S = 120.0


def _prepared(folder: Path, **settings: Any) -> Prepared:
    """A tiny base and rows that make some steps, the last of them with fewer packs than the others."""
    if not (folder / "base").is_dir():
        write_tiny_model(folder / "base", "qwen2")
        rows = ({"text": f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 3)} for n in range(149))
        (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lineage = Lineage(operation="import", code_revision="test")
    bundle = Bundle.from_folder(folder / "base", lineage=lineage, licence="Apache-2.0")
    parsed = parse_settings(json.dumps({**SETTINGS, **settings}))
    return prepare(folder / "base", bundle, folder / "code.jsonl", None, parsed)


def _spec(folder: Path, processes: int) -> dict[str, Any]:
    """What a training process is told; the pace is known, so that none is measured."""
    prepared = _prepared(folder, processes=processes)
    Paces(folder / "paces", 1).learn(prepared, Cost(time_s=1.0, memory_bytes=1 << 20, tokens=1000))
    spec = {
        "settings": {**SETTINGS, "processes": processes}, "base": str(folder / "base"), "heldout": "",
        "data": str(folder / "code.jsonl"), "lineage": prepared.bundle.lineage.to_dict(), "licence": "Apache-2.0",
        "threads": 1, "paces": str(folder / "paces"), "run_digest": "sha256:" + "0" * 64,
    }  # fmt: skip
    (folder / str(processes)).mkdir()
    (folder / str(processes) / "spec.json").write_text(json.dumps(spec))
    return spec


def _wait_for_end(training: TrainingProcesses) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while training.are_running() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    training.stop()


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_does_also_when_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-067, R-056: the same losses, samples, weights and files; the kill is a typed error that may be tried again."""
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda flag: None)
    expected = train(tmp_path / "1", _spec(tmp_path, 1))
    _spec(tmp_path, 2)
    folder = tmp_path / "2"
    training = TrainingProcesses("train_process", folder, 2)
    while checkpoint.latest(folder / "checkpoints") is None and training.are_running():
        time.sleep(0.005)
    os.kill(training.pids[1], signal.SIGKILL)
    _wait_for_end(training)
    with pytest.raises(ProcessLost, match="process 1 of 2 of the training was killed by signal 9") as lost:
        training.outcome()
    assert lost.value.retryable
    done = len(_steps(folder))
    training = TrainingProcesses("train_process", folder, 2)
    _wait_for_end(training)
    found = training.outcome()
    one, two = _steps(tmp_path / "1"), _steps(folder)
    assert 3 <= done < len(one) == len(two)
    assert [step["sample_ids"] for step in one] == [step["sample_ids"] for step in two]
    for key in ("loss", "grad_norm", "first_grad_norm", "counted", "first_counted", "tokens"):
        if not key.startswith("first"):  # two processes are through with two packs where one is with the first
            assert [step[key] for step in two] == pytest.approx([step[key] for step in one], rel=1e-5), key
    assert found["cost"]["tokens"] == expected["cost"]["tokens"]
    states = [checkpoint.read(tmp_path / name / "checkpoints" / f"step-{len(one):08d}")[1] for name in "12"]
    assert states[1].keys() - states[0].keys() == {"random.cpu.1"} and states[0].keys() < states[1].keys()
    for name, value in states[0].items():
        if name != checkpoint.RANDOM:
            torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    assert [path.name for path in files_of(folder / "bundle")] == [p.name for p in files_of(tmp_path / "1" / "bundle")]


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has joined a group in which there is no other."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_frozen_base_is_spread_with_its_adapters(tmp_path: Path, method: str, group_of_one: None) -> None:
    """In floats and in NF4: parts are gathered and given away around every layer, and not a bit of a loss differs."""
    losses: dict[str, list[float]] = {"spread": [], "whole": []}
    run = make_run(tmp_path / "spread", method)
    assert all(isinstance(value, DTensor) for value in run.decoder.parameters())
    run.run(lambda report: losses["spread"].append(report.loss))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training_runs.shard", lambda decoder, ranks: None)
        make_run(tmp_path / "whole", method).run(lambda report: losses["whole"].append(report.loss))
    assert losses["spread"] == losses["whole"]


def test_every_pack_of_a_step_is_one_process_s() -> None:
    """By turns, so that shares differ by one pack at most."""
    shares = [Ranks(rank=rank, count=3).share(range(8)) for rank in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_more_processes_than_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the start, with the number that would do; uneven shares too."""
    monkeypatch.setattr(devices, "devices_here", lambda: (1, "GPUs"))
    refusals = _prepared(tmp_path, processes=2).refusals
    assert [error.message for error in refusals] == [
        "processes=2 need a device each, but this machine has 1 GPUs; lower it to 1"
    ]
    with pytest.raises(BadConfig, match=r"packs_per_step=4 cannot be shared evenly by processes=3; make it 6"):
        _prepared(tmp_path, processes=3)


def test_the_plan_tells_processes_and_the_memory_of_each(tmp_path: Path) -> None:
    """R-068: what is stored is halved, what is computed with is not; a checkpoint is whole."""
    config = ModelConfig.from_hf(tiny_config("qwen2"))
    one, two = (TrainSettings(method="full", dtype="bfloat16", processes=count) for count in (1, 2))
    needs = components(config, two)
    assert {name: 2 * needs[name] for name in ("weights", "masters", "optimizer", "gradients")} == {
        name: components(config, one)[name] for name in ("weights", "masters", "optimizer", "gradients")
    }
    assert needs["activations"] == components(config, one)["activations"] and needs["gathered"] > 0
    assert checkpoint_bytes(config, two) == checkpoint_bytes(config, one)
    plan = plan_of(_prepared(tmp_path, processes=2), 1000)
    assert plan.items["processes"].startswith("2; memory is that of each")
