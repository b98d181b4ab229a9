"""Spikes: gradients clipped, updates dropped, weights taken back; and never by chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import STEPS, make_run

from services.trainer.checkpoints import checkpoint
from services.trainer.run import loop, spikes
from services.trainer.run.loop import Run, StepReport
from services.trainer.run.spikes import HISTORY_STEPS, SpikeGuard
from services.trainer.settings.spikes import SpikeSettings
from smeltkit.errors import TrainingDiverged


def _guard(action: str = "rollback", **settings: int) -> SpikeGuard:
    """A guard that has seen a calm run: losses and norms around 1."""
    guard = SpikeGuard(SpikeSettings(action=action, **settings))
    for step in range(2 * HISTORY_STEPS):
        assert guard.bound(1 + 0.1 * math.sin(step), 1 + 0.2 * math.cos(step)) == math.inf
    return guard


def test_a_gradient_further_out_is_clipped_the_more() -> None:
    """By the reciprocal of its score, down to the mean; the loss's own course decides nothing here."""
    allowed = [_guard("clip").bound(1.0, norm) for norm in (3.0, 10.0, 1000.0)]
    assert math.inf > allowed[0] > allowed[1] > allowed[2] > 0.9
    assert _guard("none").bound(1.0, 1000.0) == math.inf
    assert _guard("clip").bound(50.0, 1.0) == math.inf


def test_a_spike_of_the_loss_drops_the_update_and_is_not_learnt_from() -> None:
    """The same loss is a spike again and again; a calm one afterwards is none."""
    guard = _guard("skip")
    assert [guard.bound(9.0, 1.0) for _ in range(20)] == [0.0] * 20
    assert guard.bound(1.0, 1.0) == math.inf and not guard.must_go_back
    assert guard.counts == {"clipped": 0, "skipped": 20, "rollbacks": 0}


def test_a_run_goes_back_after_some_spikes_in_a_row_and_ends_after_some_rollbacks() -> None:
    """`patience` in a row, `rollbacks_max` in all."""
    guard = _guard(patience=2, rollbacks_max=1)
    for loss, is_over in ((9.0, False), (1.0, False), (9.0, False), (9.0, True)):
        guard.bound(loss, 1.0)
        assert guard.must_go_back == is_over
    guard.go_back()
    assert not guard.must_go_back
    with pytest.raises(TrainingDiverged, match="2 times"):
        guard.go_back()


def test_state_travels() -> None:
    """A guard made from another's state judges alike, to the bit."""
    one, other = _guard(), SpikeGuard(SpikeSettings())
    other.load_state(one.state())
    assert other.state() == one.state()
    assert [one.bound(1.2, n) for n in (1.0, 30.0)] == [other.bound(1.2, n) for n in (1.0, 30.0)]


def _spoiled(run: Run, steps: set[int]) -> Callable[[float, float], float]:
    """The run's own judgement, which takes the given steps (from 0) for spikes."""
    judge = run._guard.bound
    return lambda loss, norm: judge(1e6 if run.step in steps else loss, norm)


def test_weights_go_back_and_data_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three spikes: the checkpoint's weights, the next steps' rows and rates; and a resumed run is the same."""
    monkeypatch.setattr(spikes, "HISTORY_STEPS", 2)
    plain = make_run(tmp_path / "plain", "full")
    expected = [(plain.schedule.rate(step), plain._order.at(step)) for step in range(STEPS)]
    runs = []
    for name in ("whole", "parts"):
        run = make_run(tmp_path / name, "full")
        monkeypatch.setattr(run._guard, "bound", _spoiled(run, {4, 5, 6}))
        reports: list[StepReport] = []
        if name == "whole":
            run.run(reports.append)
        else:
            with pytest.raises(KeyboardInterrupt):
                run.run(lambda report: _stop_after(report, 7))
            run = make_run(tmp_path / name, "full")
            run.run(reports.append)
        runs.append((run, reports))
    (whole, reports), (parts, rest) = runs
    assert [r.is_skipped for r in reports] == [step in (4, 5, 6) for step in range(STEPS)]
    assert [(r.learning_rate, r.step) for r in reports] == [(rate, n + 1) for n, (rate, _) in enumerate(expected)]
    assert [r.sample_ids for r in reports] == [tuple(n for pack in packs for n in pack) for _, packs in expected]
    assert whole.spikes == parts.spikes and (whole.spikes["skipped"], whole.spikes["rollbacks"]) == (3, 1)
    assert [r.loss for r in rest] == [reports[-1].loss]
    pairs = zip(whole.decoder.state_dict().values(), parts.decoder.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def _stop_after(report: StepReport, step: int) -> None:
    if report.step == step:
        raise KeyboardInterrupt


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spikes before the first one end the run with what to do."""
    monkeypatch.setattr(spikes, "HISTORY_STEPS", 1)
    monkeypatch.setattr(loop.checkpoint, "latest", lambda folder: None)
    run = make_run(tmp_path, "full")
    monkeypatch.setattr(run._guard, "bound", _spoiled(run, set(range(1, STEPS))))
    with pytest.raises(TrainingDiverged, match="before the first checkpoint"):
        run.run(lambda report: None)
    assert checkpoint.latest(tmp_path) is None
