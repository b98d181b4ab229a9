"""Runs that pause and are measured on the way: stored, taken up elsewhere, and no different for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.numpy import load_file
from training_files import prepared_from, write_spec
from training_runs import STEPS, make_run, some_samples

from services.trainer import train_process
from services.trainer.checkpoints import checkpoint
from services.trainer.checkpoints.paused import CHECKPOINTS, store_paused, take_up
from services.trainer.parallel.ranks import ALONE
from services.trainer.plan import Prepared
from services.trainer.run import heldout
from services.trainer.run.early_stop import EarlyStopSettings
from services.trainer.run.heldout import HeldoutCourse
from services.trainer.run.loop import Run, StepReport
from services.trainer.run.measured import HELDOUT_FILE, read_course
from services.trainer.settings.training import TrainSettings
from services.trainer.tracking.records import METRICS_FILE
from services.trainer.work import plain
from smeltkit.blobs.local import LocalStore
from smeltkit.manifest import PAUSED_TYPE


def _numbers(reports: list[StepReport]) -> list[tuple[Any, ...]]:
    return [(r.step, r.loss, r.grad_norm, r.tokens, r.sample_ids) for r in reports]


def _outcome(run: Run) -> dict[str, Any]:
    held = [f"step-{run.step:08d}"]
    return {"paused": run.step, "checkpoints": held, "cost": asdict(run.cost), "device": "cpu", "heldout": None}


def test_a_run_that_paused_goes_on_elsewhere_as_if_it_had_not(tmp_path: Path) -> None:
    """R-057, R-058: measured on the way, stored, taken up in another folder: same losses, samples and weights, with
    dropout; what was stored is not written to."""
    expected: list[StepReport] = []
    make_run(tmp_path / "whole" / CHECKPOINTS, "lora").run(expected.append)
    first, seen = tmp_path / "first", list[StepReport]()
    first.mkdir()
    run = make_run(first / CHECKPOINTS, "lora")
    course = HeldoutCourse(first, some_samples()[:3])

    def tell(report: StepReport) -> None:
        seen.append(report)
        course.measure(run.decoder, report.step, report.tokens)

    run.run(tell, 3)
    (first / METRICS_FILE).write_text("".join(json.dumps({"step": report.step}) + "\n" for report in seen))
    assert run.step == 3 and [one.step for one in read_course(first / HELDOUT_FILE)] == [1, 2, 3]
    store, told = LocalStore(tmp_path / "store"), list[int]()
    paused = store_paused(store, first, {"base": "b"}, _outcome(run), told.append)
    assert paused.artifact_type == PAUSED_TYPE and paused.config["step"] == 3 and told[-1] == paused.size_bytes
    other = tmp_path / "other"
    for _ in range(2):
        take_up(store, store.get_manifest(paused.digest), other)
    assert {path.name for path in other.iterdir()} == {CHECKPOINTS, METRICS_FILE, HELDOUT_FILE}
    resumed = make_run(other / CHECKPOINTS, "lora")
    assert resumed.step == 3
    resumed.run(seen.append)
    assert _numbers(seen) == _numbers(expected)
    final = [checkpoint.read(tmp_path / name / CHECKPOINTS / f"step-{STEPS:08d}")[1] for name in ("whole", "other")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_measurements_after_the_step_where_a_run_goes_on_are_made_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / CHECKPOINTS, "full")
    course = HeldoutCourse(tmp_path, some_samples()[:3])
    made = [course.measure(run.decoder, step, 10 * step) for step in (0, 2, 4)]
    assert course.measure(run.decoder, 2, 99) is made[1], "each is made once"
    again = HeldoutCourse(tmp_path, some_samples()[:3])
    assert again.measured == made
    again.keep_until(3)
    assert again.measured == made[:2] == read_course(tmp_path / HELDOUT_FILE)
    assert again.comparison().change == 0.0 and again.comparison().rows == 3


def test_where_a_run_pauses_is_no_part_of_what_is_trained(tmp_path: Path) -> None:
    """It counts steps and tokens until then; it must come before the end."""
    whole, paused = prepared_from(tmp_path), prepared_from(tmp_path, until_step=2)
    assert plain(whole.settings) == plain(paused.settings) and not paused.refusals
    assert (paused.end_step, paused.tokens) == (2, whole.order.tokens_in(2))
    (refusal,) = prepared_from(tmp_path, until_step=whole.schedule.total_steps).refusals
    assert f"must be below the run's {whole.schedule.total_steps} steps" in refusal.message


def test_a_run_that_stops_early_ends_in_its_best_weights(tmp_path: Path) -> None:
    """With the checkpoint of its best measurement, however many came after it; the outcome says which, and by how much
    it is better than the base. Whoever takes the run over before its outcome is told ends in the same."""
    settings = {"method": "lora", "learning_rate": 0.1, "schedule": "constant", "keep_checkpoints": 1, "epochs": 4}
    spec = write_spec(tmp_path, "run", is_measured=True, **settings, early_stop={"steps": 1, "patience": 3})
    outcome = train_process.train(tmp_path / "run", spec)
    course = read_course(tmp_path / "run" / HELDOUT_FILE)
    best = min(course[1:], key=lambda one: one.loss)
    assert outcome["best"] == {"step": best.step, "of": course[-1].step} and 0 < best.step < course[-1].step
    assert outcome["heldout"]["after"] == pytest.approx(best.loss) and outcome["stopped"]["step"] == course[-1].step
    kept = checkpoint.read(tmp_path / "run" / CHECKPOINTS / f"step-{best.step:08d}", "weights.")[1]
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    stored = {value.numpy().tobytes() for value in kept.values()}
    assert all(value.tobytes() in stored for value in load_file(adapter).values())
    first = adapter.read_bytes()
    adapter.unlink()
    again = train_process.train(tmp_path / "run", spec)
    assert {key: again[key] for key in ("best", "stopped", "heldout")} == {
        key: outcome[key] for key in ("best", "stopped", "heldout")
    }
    assert adapter.read_bytes() == first


def test_a_run_whose_heldout_loss_stands_still_ends_early_and_stays_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the step saved that decided; whoever takes the run over before its outcome is told does no more."""
    monkeypatch.setattr(heldout, "row_losses", lambda *given: [1.0, 2.0])
    monkeypatch.setattr(train_process.signal, "signal", lambda *handler: None)
    settings = TrainSettings(early_stop=EarlyStopSettings(steps=2, patience=1))
    prepared = cast(Prepared, SimpleNamespace(settings=settings, end_step=STEPS))
    for _ in range(2):
        run = make_run(tmp_path / CHECKPOINTS, "full")
        course = HeldoutCourse(tmp_path, some_samples()[:2])
        why = train_process.run_to_end(run, prepared, ALONE, None, course)
        assert run.step == 4 and "no better than after step 2" in why
        assert checkpoint.latest(tmp_path / CHECKPOINTS) == tmp_path / CHECKPOINTS / "step-00000004"
    assert [one.step for one in course.measured] == [2, 4]
