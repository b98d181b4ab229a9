"""What a run's measurements say of more tokens, other steps, and whether to go on at all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from services.trainer.run.early_stop import EarlyStopSettings, why_stop
from services.trainer.run.measured import Measured
from services.trainer.run.noise import advice
from services.trainer.run.scaling import outlook
from services.trainer.settings.training import TrainSettings, parse_settings
from services.trainer.work import beyond_budget, plain
from smeltkit.errors import BadConfig, UnsupportedOption

ROWS = 200


def _course(*losses: float, noise: float = 0.01, step: int = 20) -> list[Measured]:
    """Measurements of those mean losses every `step` steps of 1,000 tokens, each row off by a noise of its own."""
    draw = np.random.default_rng(0)
    rows = draw.normal(0, 0.5, ROWS)
    return [
        Measured(step=n * step, tokens=n * step * 1000, losses=tuple(loss + rows + draw.normal(0, noise, ROWS)))
        for n, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("points", [3, 8])
def test_a_law_is_found_again_with_its_floor_exponent_and_gain(points: int) -> None:
    """Planted E = 1.2, A = 3 at 1,000 tokens, alpha = 0.3; each lies within what is told of it, or close to it."""
    planted = [9.0, *(1.2 + 3 * (20 * n) ** -0.3 for n in range(1, points + 1))]
    found = outlook(_course(*planted), 100.0)
    assert found is not None and found.points == points and found.is_worth_it and "stop" not in found.advice
    assert found.floor_low < 1.25 and found.floor_high > 1.15
    assert found.exponent_low - 0.02 < 0.3 < found.exponent_high + 0.02
    last = 20 * points
    assert found.again.tokens == last * 1000 and found.hour is not None and found.hour.tokens == 360_000
    assert found.again.gain == pytest.approx(3 * (last**-0.3 - (2 * last) ** -0.3), rel=0.1)
    assert found.again.low < found.again.gain < found.again.high < found.hour.gain


def test_a_course_that_is_flat_says_to_stop() -> None:
    """The expected gain is below what these samples tell; nothing is told of an hour where the speed is unknown."""
    found = outlook(_course(3.0, 1.0, 1.0, 1.0, 1.0, noise=0.05))
    assert found is not None and not found.is_worth_it and found.hour is None
    assert "stop, 4 measurements expect less than these samples can tell" in found.advice
    assert json.loads(json.dumps(found.to_dict()))["is_worth_it"] is False


def test_what_lies_far_beyond_the_tokens_seen_is_not_foretold() -> None:
    """At most ten times those; an hour of more is named with its tokens, and that it is too far."""
    course = _course(3.0, 2.0, 1.5, 1.3)
    near, far = outlook(course, 600_000 / 3600), outlook(course, 600_100 / 3600)
    assert near is not None and near.hour is not None and near.hour.tokens == 600_000
    assert far is not None and far.hour is None and far.to_dict()["hour_tokens"] == 600_100
    assert "an hour more (600,100 tokens): too far from the 60,000 that were measured" in far.advice


def test_too_few_measurements_give_no_law() -> None:
    """The base before the first step is none: no law holds for no tokens."""
    assert outlook(_course(3.0, 2.0, 1.5)) is None and outlook([]) is None


def test_steps_far_from_the_noise_scale_are_worth_a_word() -> None:
    """Four times below or above it; in between nothing is said."""
    assert advice(10_000, 1000).startswith(
        "a step learns 1,000 tokens, 0.1 of the gradient noise scale (10,000): larger"
    )
    assert "smaller steps" in advice(1000, 10_000)
    assert advice(1000, 3000) == advice(1000, 300) == ""


def test_a_run_stops_once_it_is_no_better_for_as_long_as_it_may() -> None:
    """A fall within its uncertainty is no gain, however small the loss gets; a real one begins the count anew."""
    patient = EarlyStopSettings(steps=20, patience=2)
    assert why_stop(_course(3.0, 2.0, 1.5, 1.4999), patient) == ""
    why = why_stop(_course(3.0, 2.0, 1.5, 1.4999, 1.4998), patient)
    assert why.startswith("held-out loss 1.") and "no better than after step 40" in why and "2 measurements" in why
    assert why_stop(_course(3.0, 2.0, 1.5, 1.4999, 1.3), patient) == ""
    assert why_stop(_course(3.0, 1.5, 1.6, 1.7), EarlyStopSettings()) == ""
    assert why_stop(_course(3.0, 2.0, 1.5, 1.4999, 1.4998, step=7), patient) == "", "those steps are not its own"


def test_what_is_averaged_hides_a_bad_measurement() -> None:
    """One that is worse by chance does not stop a run whose average still falls."""
    course = _course(3.0, 2.0, 1.6, 1.7, 1.3)
    assert why_stop(course[:4], EarlyStopSettings(steps=20, patience=1))
    assert why_stop(course[:4], EarlyStopSettings(steps=20, patience=1, window=2)) == ""
    assert EarlyStopSettings(steps=20, patience=3, window=2).first_step == 100


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"early_stop": {"patience": 5}}, UnsupportedOption, "no effect with early_stop.steps=0"),
        ({"early_stop": {"steps": 5, "patience": 0}}, BadConfig, "early_stop.patience=0 must be 1 to 1000"),
        ({"early_stop": {"steps": 5, "windows": 2}}, BadConfig, "did you mean early_stop.window"),
        ({"heldout_steps": -1}, BadConfig, "heldout_steps=-1 must be 0"),
    ],
)
def test_settings_of_measuring_are_read_or_refused(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_settings(json.dumps(value))


def test_a_training_beyond_its_budget_is_refused() -> None:
    """By the hours of all its devices; what has no forecast is not held against it."""
    settings = TrainSettings(hours_max=1.5, processes=2)
    assert beyond_budget(settings, 2700.0) == beyond_budget(settings, 0.0) == beyond_budget(TrainSettings(), 1e9) == []
    (refusal,) = beyond_budget(settings, 3600.0)
    assert "hours_max=1.5 device hours, but 2 are foreseen; lower max_steps" in refusal.message
    assert "hours_max" not in plain(settings)
