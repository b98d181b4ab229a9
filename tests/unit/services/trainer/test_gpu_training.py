"""Trainings on GPUs, by the processes that a job starts: they run, and again with the same numbers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import children_of, steps_of, wait_for_end, write_spec
from training_runs import STEPS, make_run, some_samples

from services.trainer.checkpoints import checkpoint
from services.trainer.optim.optimizer import Optimizer
from services.trainer.parallel.groups import RESTARTS_FILE
from services.trainer.parallel.launch import TrainingProcesses
from services.trainer.run.device import prepare_device
from services.trainer.run.packs import pack_of
from services.trainer.run.step import train_step
from services.trainer.settings.training import AdamSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.kernels import kernels_for
from smeltkit.testing.tiny_models import tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TOLD = ("step", "loss", "grad_norm", "tokens", "sample_ids")


def _trained(folder: Path, *names: str) -> list[dict[str, Any]]:
    """The outcomes of trainings that run side by side."""
    processes = 2 if names[0] == "2" else 1
    trainings = [TrainingProcesses("train_process", folder / name, processes) for name in names]
    for training in trainings:
        wait_for_end(training)
    return [training.outcome() for training in trainings]


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_job_trains_on_a_gpu_and_again_to_the_bit(tmp_path: Path, method: str) -> None:
    """R-057, R-067: samples of all lengths in bf16; what would not be deterministic is refused by torch."""
    for name in ("a", "b"):
        write_spec(tmp_path, name, method=method, dtype="bfloat16", pack_tokens=256, epochs=3)
    first, second = _trained(tmp_path, "a", "b")
    assert "reason" not in first and first["device"] == torch.cuda.get_device_name()
    one, two = ([[step[key] for key in TOLD] for step in steps_of(tmp_path / name)] for name in "ab")
    assert one == two and len(one) > 5
    assert first["cost"]["tokens"] == second["cost"]["tokens"]


@pytest.mark.parametrize("how", [{"offload": True}, {"state": "int8"}], ids=str)
def test_optimizer_state_of_other_kinds_learns_on_a_gpu(how: dict[str, Any]) -> None:
    """R-047: weights in bf16; the same losses offloaded, within 2 % with 8 bits."""
    prepare_device(0)
    losses = []
    for settings in (AdamSettings(), AdamSettings(**how)):
        torch.manual_seed(4)
        decoder = Decoder(ModelConfig.from_hf(tiny_config("qwen2")), kernels=kernels_for("cuda")).to("cuda").bfloat16()
        optimizer = Optimizer(decoder.named_parameters(), settings)
        packs = [pack_of(some_samples()[:6], "cuda")]
        steps = (train_step(decoder, optimizer, packs, learning_rate=2e-3, clip_norm=1.0).loss for _ in range(8))
        losses.append(list(steps))
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if "state" in how else 1e-3)
    assert losses[1][-1] < 0.7 * losses[1][0]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stopped_and_resumed_on_a_gpu_equals_never_stopped(tmp_path: Path, method: str) -> None:
    """R-057: with dropout drawn from the GPU's own generator; steps, weights and optimizer state to the bit."""
    prepare_device(0)
    whole: list[float] = []
    make_run(tmp_path / "whole", method, device="cuda").run(lambda report: whole.append(report.loss))
    parts: list[float] = []
    steps = make_run(tmp_path / "parts", method, device="cuda").steps()
    parts += [next(steps).loss for _ in range(5)][:4]
    del steps
    torch.cuda.manual_seed(99)
    resumed = make_run(tmp_path / "parts", method, device="cuda")
    assert resumed.step == 4
    resumed.run(lambda report: parts.append(report.loss))
    assert parts == whole and len(whole) == STEPS
    final = [checkpoint.read(tmp_path / name / f"step-{STEPS:08d}")[1] for name in ("whole", "parts")]
    assert "random.cuda" in final[0] and final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_two_gpus_train_as_one_does(tmp_path: Path, method: str) -> None:
    """R-067: the same losses in float32 but for rounding, and the same files."""
    for name, processes in (("1", 1), ("2", 2)):
        write_spec(tmp_path, name, method=method, processes=processes)
        (outcome,) = _trained(tmp_path, name)
        assert "reason" not in outcome, outcome
    one, two = ([step["loss"] for step in steps_of(tmp_path / name)] for name in "12")
    assert two == pytest.approx(one, rel=1e-4)
    assert {p.name for p in (tmp_path / "1" / "bundle").iterdir()} == {
        p.name for p in (tmp_path / "2" / "bundle").iterdir()
    }


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_two_gpus_begin_again_at_the_last_checkpoint_when_one_process_is_killed(tmp_path: Path) -> None:
    """R-056, R-067: the one that waits for the other in NCCL is ended too; then the losses of one GPU, but for
    rounding."""
    write_spec(tmp_path, "1")
    (outcome,) = _trained(tmp_path, "1")
    one = [step["loss"] for step in steps_of(tmp_path / "1")]
    write_spec(tmp_path, "2", processes=2)
    training = TrainingProcesses("train_process", tmp_path / "2", 2)
    metrics = tmp_path / "2" / "metrics.jsonl"
    while not metrics.is_file() or len(steps_of(tmp_path / "2")) < len(one) // 2:
        assert training.are_running(), (tmp_path / "2" / "log.txt").read_text()
        time.sleep(0.01)
    os.kill(children_of(training.pid)[1], signal.SIGKILL)
    wait_for_end(training)
    outcome = training.outcome()
    assert "reason" not in outcome, outcome
    assert len((tmp_path / "2" / RESTARTS_FILE).read_text().splitlines()) == 1
    assert [step["loss"] for step in steps_of(tmp_path / "2")] == pytest.approx(one, rel=1e-4)
