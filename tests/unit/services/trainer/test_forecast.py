"""Forecasts: extended from shallow copies, held against the outcome."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.trainer.costs import paces
from services.trainer.costs.forecast import Cost, Pace, at_depth, forecast, learnt, missed
from services.trainer.data.order import Order
from services.trainer.settings.training import TrainSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.testing.tiny_models import tiny_config


def test_every_further_layer_costs_the_same() -> None:
    """R-068: ten layers from one and three; a model that was measured whole is taken as it is."""
    shallow = {"layers": 1, "step_s": 1.0, "step_tokens": 100, "memory_bytes": 50, "processor_share": 1.0}
    deep = {"layers": 3, "step_s": 1.4, "step_tokens": 100, "memory_bytes": 70, "processor_share": 0.95}
    found = at_depth(shallow, deep, 10)
    assert (found.step_s, found.memory_bytes, found.processor_share) == (pytest.approx(2.8), 140, 0.95)
    assert at_depth(shallow, shallow, 1) == Pace(step_s=1.0, step_tokens=100, memory_bytes=50)
    assert forecast(found, 1000) == Cost(time_s=pytest.approx(28.0), memory_bytes=140, tokens=1000)


def test_what_a_run_took_corrects_the_pace_that_was_measured() -> None:
    """R-068: other work only slows a step down, so the faster pace counts; a pace of a busy machine says that it is."""
    slow = Pace(step_s=4.0, step_tokens=100, memory_bytes=70, processor_share=0.3)
    took = Cost(time_s=10.0, memory_bytes=90, tokens=1000)
    own = Pace(step_s=10.0, step_tokens=1000, memory_bytes=90)
    assert not slow.is_quiet and learnt(None, took) == learnt(slow, took) == own
    fast = Pace(step_s=0.5, step_tokens=100, memory_bytes=70)
    assert learnt(fast, took) == replace(fast, memory_bytes=90)
    assert forecast(learnt(slow, took), 2000) == Cost(time_s=20.0, memory_bytes=90, tokens=2000)


def test_a_forecast_that_is_far_off_is_named() -> None:
    """R-068: by more than 15 % of what was said, to either side."""
    said = Cost(time_s=100.0, memory_bytes=1000, tokens=50)
    assert missed(said, Cost(time_s=114.0, memory_bytes=860, tokens=50)) == ()
    assert missed(said, Cost(time_s=116.0, memory_bytes=840, tokens=51)) == ("time_s", "memory_bytes")


def test_tokens_of_a_run_are_counted_to_the_sample() -> None:
    """R-068: whole epochs and parts of one."""
    order = Order(lengths=(5, 7, 3, 8, 6), pack_tokens=10, packs_per_step=2, seed=1)
    assert order.tokens_in(order.steps_in(2)) == 2 * 29
    assert 0 < order.tokens_in(1) < 29


def test_a_pace_of_a_busy_machine_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-068: it serves for minutes, so that plan and run agree; a quiet one stays, until a run was faster."""
    busy = Pace(step_s=4.0, step_tokens=100, memory_bytes=70, processor_share=0.3)
    quiet, found = replace(busy, step_s=1.0, processor_share=1.0), [busy]
    measured: list[Pace] = []

    def measure(asked: bytes, names: dict[str, str]) -> Pace:
        measured.append(found[0])
        return found[0]

    monkeypatch.setattr(paces, "_measure", measure)
    order = Order(lengths=(5, 7), pack_tokens=10, packs_per_step=2, seed=1)
    config = ModelConfig.from_hf(tiny_config("qwen2"))
    prepared: Any = SimpleNamespace(config=config, settings=TrainSettings(), order=order)
    kept = paces.Paces(tmp_path, 1)
    assert kept.of(prepared) == kept.of(prepared) == busy and len(measured) == 1
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    found[0] = quiet
    assert kept.of(prepared) == quiet and len(measured) == 2
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert kept.of(prepared) == quiet and len(measured) == 2
    kept.learn(prepared, Cost(time_s=5.0, memory_bytes=90, tokens=1000))
    assert kept.of(prepared) == Pace(step_s=5.0, step_tokens=1000, memory_bytes=90)
