"""Time for a completion follows from measured speed and from the tokens that it may have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.pace import Pace
from smeltkit import limits

FIRST_S = limits.EVALUATION_FIRST_TOKEN_S
completions = st.lists(st.tuples(st.integers(1, 4096), st.floats(0.001, 100_000)), max_size=20)


def test_before_a_measurement_the_slowest_engine_admitted_is_assumed() -> None:
    assert Pace().timeout_s(512) == FIRST_S + limits.EVALUATION_TOKEN_S * 512


def test_a_slow_engine_gets_the_time_that_it_needs() -> None:
    """R-039: at 3 seconds a token a long answer is not cut off by a constant made for faster ones."""
    pace = Pace()
    pace.add(100, 300)
    assert pace.timeout_s(4096) > 3 * 4096


def test_a_fast_engine_that_hangs_is_given_up_early() -> None:
    """R-039."""
    pace = Pace()
    pace.add(100, 0.5)
    assert pace.timeout_s(4096) < FIRST_S + 200


@given(completions, st.integers(1, 32_768))
def test_whatever_was_measured_would_have_had_time_and_more_tokens_get_more(
    measured: list[tuple[int, float]], max_tokens: int
) -> None:
    """R-039."""
    pace = Pace()
    for tokens, seconds in measured:
        pace.add(tokens, seconds)
    long = [(tokens, seconds) for tokens, seconds in measured if tokens >= limits.EVALUATION_PACE_TOKENS_MIN]
    assert all(pace.timeout_s(tokens) > seconds for tokens, seconds in long)
    assert pace.timeout_s(max_tokens) > pace.timeout_s(max_tokens - 1) > FIRST_S - 1
