"""Whole runs: resumed to the bit, killed anywhere, stopped when they only look like training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from training_runs import STEPS, make_run

from services.trainer.checkpoints import checkpoint
from services.trainer.checkpoints import files as checkpoint_files
from services.trainer.optim.optimizer import Optimizer
from services.trainer.parallel.ranks import Ranks
from services.trainer.run import loop, watch
from services.trainer.run.loop import Run, StepReport
from services.trainer.settings.training import AdamSettings
from services.trainer.tracking.alerts import CHANGED, of_outcome
from services.trainer.train_process import taken
from smeltkit.errors import DeadGradient, DigestMismatch, SettingsDiffer, TrainingDiverged

HERE = Path(__file__).parent


def _trail(run: Run) -> list[StepReport]:
    reports: list[StepReport] = []
    run.run(reports.append)
    return reports


def _same(one: list[StepReport], other: list[StepReport]) -> bool:
    """Whether steps saw the same samples and gave the same numbers, bit for bit; speed may differ."""
    kept = [
        [(r.step, r.stage, r.loss, r.learning_rate, r.grad_norm, r.tokens, r.heldout_loss, r.sample_ids) for r in run]
        for run in (one, other)
    ]
    return kept[0] == kept[1]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path, method: str) -> None:
    """R-057: losses, samples, weights and optimizer state, with dropout drawn from the stored generator; from a
    checkpoint in the first of two stages, and from one in the second."""
    whole = make_run(tmp_path / "whole", method)
    expected = _trail(whole)
    seen: list[StepReport] = []

    class Stop(Exception):
        """Ends a run from outside."""

    def tell(report: StepReport) -> None:
        seen.append(report)
        if len(seen) == stop:
            raise Stop

    for done, stop in ((0, 3), (2, 5)):  # noqa: B007
        run = make_run(tmp_path / "parts", method)
        assert run.step == done
        seen = seen[:done]
        with pytest.raises(Stop):
            run.run(tell)
    before = {path: path.read_bytes() for path in (tmp_path / "parts" / "step-00000004").iterdir()}
    resumed = make_run(tmp_path / "parts", method)
    assert resumed.step == 4
    rest = _trail(resumed)
    assert _same(seen[:4] + rest, expected)
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())
    final = [checkpoint.read(tmp_path / name / f"step-{STEPS:08d}")[1] for name in ("whole", "parts")]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_the_generator_of_a_gpu_goes_on_where_the_checkpoint_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-057: with a generator in the place of a GPU's; trying the longest pack does not move it."""
    stand_in = torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", stand_in.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", stand_in.set_state)
    run = make_run(tmp_path, "lora")
    forward = run.decoder.hidden
    monkeypatch.setattr(run.decoder, "hidden", lambda batch: (torch.rand((), generator=stand_in), forward(batch))[1])
    stand_in.manual_seed(7)
    next(run.steps())
    expected = torch.Generator().manual_seed(7)
    for _ in range(2):  # packs of one step
        torch.rand((), generator=expected)
    assert torch.equal(stand_in.get_state(), expected.get_state())
    run.save()
    stand_in.manual_seed(8)
    assert make_run(tmp_path, "lora").step == 1
    assert torch.equal(stand_in.get_state(), expected.get_state())


def test_a_run_killed_at_any_step_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """R-056, R-057: kill -9 at a random moment; what is repeated is one interval and the steps while it was written."""
    expected = [(r.step, r.loss, r.sample_ids) for r in _trail(make_run(tmp_path / "whole", "lora"))]
    command = [sys.executable, str(HERE / "training_runs.py"), str(tmp_path / "killed"), "lora"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{Path.cwd()}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("5 "):
            time.sleep(float(torch.rand(1)) * 0.05)
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = make_run(tmp_path / "killed", "lora")
    assert 2 <= resumed.step <= STEPS
    start = resumed.step
    assert [(r.step, r.loss, r.sample_ids) for r in _trail(resumed)] == expected[start:]


def test_another_revision_of_the_code_goes_on_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-060: whatever did the steps is on record, each revision with the steps before it, and told as an alert."""
    monkeypatch.setattr(loop, "code_revision", lambda: "a" * 12)
    begun = make_run(tmp_path, "full")
    steps = begun.steps()
    for _ in range(5):
        next(steps)
    begun.wait_for_saving()
    for _ in range(2):
        monkeypatch.setattr(loop, "code_revision", lambda: "b" * 12)
        run = make_run(tmp_path, "full")
        assert run.codes == (("a" * 12, 0), ("b" * 12, 4))
        run.save()
    (alert,) = of_outcome(STEPS, taken(run))
    assert (alert.step, alert.when) == (4, CHANGED) and "b" * 12 in alert.message
    told = tmp_path / "step-00000004" / checkpoint.PROGRESS_FILE
    told.write_text(told.read_text().replace('"codes"', '"program"'))
    with pytest.raises(SettingsDiffer, match="step-00000004 was written by code"):
        make_run(tmp_path, "full")


def test_who_computes_layers_together_draws_the_same_numbers(tmp_path: Path) -> None:
    """Also after another arrangement of processes: all with the same tokens take up the state of the first of them."""
    _trail(make_run(tmp_path, "lora"))
    newest = tmp_path / "step-00000008"
    run = make_run(tmp_path, "lora")
    run._ranks = Ranks(rank=1, tensor=2)
    torch.manual_seed(99)
    run._restore(newest)
    assert torch.equal(torch.get_rng_state(), checkpoint.read(newest, "random.cpu")[1]["random.cpu"])
    assert [Ranks(rank=rank, count=6, tensor=2).leader for rank in range(6)] == [0, 0, 2, 2, 4, 4]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-057: it holds the state of its own step, whatever happened since, and is not there before it is whole."""
    _trail(make_run(tmp_path / "other", "full", keep=4))
    gate, write = threading.Event(), checkpoint.save_parts
    monkeypatch.setattr(checkpoint, "save_parts", lambda *given, **named: gate.wait() and write(*given, **named))
    steps = make_run(tmp_path / "this", "full", keep=4).steps()
    assert [next(steps).step for _ in range(4)] == [1, 2, 3, 4]
    assert checkpoint.latest(tmp_path / "this") is None
    gate.set()
    assert [report.step for report in steps] == [5, 6, 7, 8]
    for name in ("step-00000002", "step-00000008"):
        one, other = (checkpoint.read(tmp_path / folder / name)[1] for folder in ("this", "other"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_went_wrong_in_writing_a_checkpoint_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-059: a full disk, and a disk that does not keep what it is given; neither leaves a checkpoint."""
    broken: dict[type[BaseException], Callable[[BinaryIO, memoryview], object]] = {
        OSError: lambda file, data: os.write(os.open("/dev/full", os.O_WRONLY), b"x"),
        DigestMismatch: lambda file, data: file.write(bytes(len(data))),
    }
    for number, (error, append) in enumerate(broken.items()):
        monkeypatch.setattr(checkpoint_files, "_append", append)
        with pytest.raises(error):
            _trail(make_run(tmp_path / str(number), "lora"))
        assert checkpoint.latest(tmp_path / str(number)) is None


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """Retention is a number of the settings; what was being written when a process died does not count."""
    _trail(make_run(tmp_path, "lora"))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000006", "step-00000008"]
    (tmp_path / ".step-00000010.new").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000008"


def test_a_checkpoint_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    """R-059: by digest, not by size; and a checkpoint of another run is never taken over (R-058)."""
    _trail(make_run(tmp_path, "lora"))
    with pytest.raises(SettingsDiffer, match="another run"):
        make_run(tmp_path, "lora", run_digest="sha256:" + "1" * 64)
    for path in (tmp_path / "step-00000008").iterdir():
        if path.name != checkpoint.PROGRESS_FILE:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            with pytest.raises(DigestMismatch, match=path.name):
                make_run(tmp_path, "lora")
            data[-1] ^= 1
            path.write_bytes(data)
    assert make_run(tmp_path, "lora").step == STEPS


def test_no_checkpoint_holds_a_value_that_is_not_finite(tmp_path: Path) -> None:
    """R-049: nothing is written, and what was there stays."""
    run = make_run(tmp_path, "full")
    with torch.no_grad():
        run.decoder.norm.weight[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="norm.weight"):
        run.save()
    assert checkpoint.latest(tmp_path) is None


def test_executed_rates_are_the_planned_curve(tmp_path: Path) -> None:
    """R-046: every step, as read back from the optimizer."""
    run = make_run(tmp_path, "full")
    assert [report.learning_rate for report in _trail(run)] == [run.schedule.rate(step) for step in range(STEPS)]


def test_dead_gradients_and_moved_weights_are_found(tmp_path: Path) -> None:
    """R-048: an adapter's A may be still in the first step only; frozen weights never move by a bit."""
    run = make_run(tmp_path, "lora")
    optimizer = Optimizer(run.decoder.named_parameters(), AdamSettings())
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    first = next(i for i, name in enumerate(optimizer.names) if name.endswith(".a"))
    optimizer.parameters[first].grad = torch.zeros_like(optimizer.parameters[first])
    optimizer.step(1e-3)
    watch.check_alive(optimizer, is_first=True)
    with pytest.raises(DeadGradient, match=r"\.a gets no gradient"):
        watch.check_alive(optimizer, is_first=False)
    before = watch.frozen_print(run.decoder)
    watch.check_frozen(run.decoder, before)
    with torch.no_grad():
        weight = run.decoder.embed.weight
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    with pytest.raises(DeadGradient, match="embed.weight"):
        watch.check_frozen(run.decoder, before)


def test_a_loss_that_never_changes_stops_the_run() -> None:
    """R-049: constant over so many steps, not merely close."""
    watch.check_moving([0.7] * 4, 5)
    watch.check_moving([0.7] * 4 + [0.7000001], 5)
    with pytest.raises(TrainingDiverged, match="5 steps in a row"):
        watch.check_moving([1.0] + [0.7] * 5, 5)
