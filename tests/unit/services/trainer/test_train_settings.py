"""Settings and schedules of a training: strict, and refused where they cannot come true."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.cli import training_file
from services.trainer.optim.schedule import Schedule
from services.trainer.settings.training import FILE_KEYS, LoraSettings, TrainSettings, parse_settings
from services.trainer.worker import METHODS
from smeltkit.errors import BadConfig, UnsupportedOption


def test_numbers_may_be_written_as_people_write_them() -> None:
    """32K, 1e-4 and 1_000 are numbers."""
    text = (
        '{"sequence_tokens": "2K", "learning_rate": "1e-4", "max_steps": "1_000", "lora": {"rank": 8, "alpha": "16"}}'
    )
    found = parse_settings(text)
    assert (found.sequence_tokens, found.learning_rate, found.max_steps) == (2048, 1e-4, 1000)
    assert found.lora == LoraSettings(rank=8, alpha=16.0)
    assert parse_settings("") == TrainSettings()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"learning_rat": 1}, "did you mean learning_rate"),
        ({"lora": {"rnk": 1}}, "did you mean lora.rank"),
        ({"xyz": 1}, "known are base, data, heldout, name, adapters, sweep, epochs, max_steps, min_tokens, stages, "),
        ({"stages": [{"xyz": 1}]}, r"stages\[0\].xyz is no setting; known are epochs, max_steps, min_tokens, data$"),
        ({"sweeps": {}}, "did you mean sweep"),
        ({"adapters": []}, "stands beside"),
        ({"lora": {"xyz": 1}}, "lora.xyz is no setting; known are rank"),
        ({"epochs": 0}, "epochs=0 must be 1"),
        ({"epochs": 1.5}, "whole number"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"learning_rate": 3}, "learning_rate=3.0 must be"),
        ({"schedule": "cosin"}, "must be one of cosine"),
        ({"recompute": "yes"}, "true or false"),
        ({"lora": {"targets": "attn.q"}}, "list of names"),
        ({"neftune": {"alpha": -1}}, "neftune.alpha=-1.0 must be"),
        ({"neftune": 5}, "neftune must be a mapping"),
        ({"method": "dora"}, "must be one of lora, .*; write lora: {dora: true}"),
        ({"code": "zzz"}, "code='zzz' must be twelve hex digits"),
        ({"mix": [-1]}, r"mix\[0\]=-1.0 must be 1e-06 to 1000"),
        ([1], "mapping"),
    ],
)
def test_unknown_keys_and_values_out_of_range_are_refused(value: Any, says: str) -> None:
    """R-006: with the key, the value, and what is meant or allowed."""
    with pytest.raises(BadConfig, match=says):
        parse_settings(json.dumps(value))


def test_the_command_line_names_the_methods_that_the_trainer_has() -> None:
    """A method that only one of them knew could be planned by nobody."""
    assert {number: name for name, number in training_file._METHODS.items()} == METHODS
    assert {*training_file._OWN_KEYS, "adapters", "sweep"} == set(FILE_KEYS)


def test_settings_without_effect_are_refused() -> None:
    """R-006: what this mode does not read is an error."""
    rounded = {"optimizer": {"state": "bfloat16"}}
    for value in (
        {"method": "full", "lora": {"rank": 4}},
        {"schedule": "constant", "final_share": 0.5},
        {**rounded, "dtype": "bfloat16"},
        {**rounded, "method": "full"},
        {"neftune": {"alpha": 0}},
    ):
        with pytest.raises(UnsupportedOption, match="no effect|adds no noise"):
            parse_settings(json.dumps(value))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_and_ends_where_it_says(kind: str) -> None:
    """R-046: the planned curve, step by step."""
    plan = Schedule(kind=kind, peak=1e-3, warmup_steps=4, total_steps=50, final_share=0.2)
    curve = [plan.rate(step) for step in range(50)]
    assert curve[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert max(curve) == curve[4] == 1e-3
    assert curve[-1] == pytest.approx(1e-3 if kind == "constant" else 0.2e-3)
    assert all(a >= b for a, b in zip(curve[4:], curve[5:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "horizon", "says"),
    [
        ({"warmup_steps": 11}, 0, "warmup_steps=11"),
        ({"warmup_steps": 200}, 0, "warmup_steps=200"),
        ({}, 155_000, "horizon_steps=155000, but the run has 100"),
    ],
)
def test_schedules_that_cannot_come_true_are_refused(schedule: Any, horizon: int, says: str) -> None:
    """R-045: a warm-up that is too long or never ends, a foreign horizon; for steps and tokens see the stages."""
    plan = Schedule(**{"kind": "cosine", "peak": 1e-3, "warmup_steps": 0, "total_steps": 100, **schedule})
    found = plan.refusals(horizon_steps=horizon)
    assert any(says in error.message for error in found), found
    fitting = Schedule(kind="cosine", peak=1e-3, warmup_steps=10, total_steps=100)
    assert fitting.refusals(horizon_steps=100) == []
