"""Sampling: ranges, filters against the reference library, and draws that depend on seed and position alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from smeltkit.errors import BadSampling, InternalError
from smeltkit.ml.sampling import (
    Logits,
    Sampler,
    SamplingParams,
    candidates,
    log_softmax,
    token_logprobs,
    top_logprobs,
    uniform,
)

LOGITS = st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=60).map(lambda v: np.array(v, dtype=np.float32))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 80),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    seed=st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1.0, "0 (greedy) or 0.01 to 10"),
        ("temperature", 0.001, "0.01 to 10"),
        ("temperature", math.nan, "0.01 to 10"),
        ("temperature", math.inf, "0.01 to 10"),
        ("top_k", -1, "0 (keep all) or more"),
        ("top_p", 0.0, "above 0, up to 1"),
        ("top_p", 1.01, "above 0, up to 1"),
        ("top_p", math.nan, "above 0"),
        ("min_p", -0.1, "0 (keep all) to 1"),
        ("min_p", 1.1, "0 (keep all) to 1"),
        ("repetition_penalty", 0.0, "0.1 to 10"),
        ("repetition_penalty", 1e9, "0.1 to 10"),
        ("seed", -1, "0 to 18446744073709551615"),
        ("seed", 2**64, "0 to 18446744073709551615"),
    ],
)
def test_value_out_of_range_names_field_value_and_range(field: str, value: float, allowed: str) -> None:
    with pytest.raises(BadSampling) as raised:
        SamplingParams(**{field: value})
    assert field in raised.value.message and allowed in raised.value.message
    assert raised.value.details == {"field": field}


@given(LOGITS, st.integers(0, 10**6))
def test_greedy_takes_the_first_of_the_largest_logits(logits: Logits, step: int) -> None:
    assert Sampler(SamplingParams()).pick(logits, step) == int(np.flatnonzero(logits == logits.max())[0])


@given(LOGITS, PARAMS, st.integers(0, 10**6))
def test_a_draw_is_a_candidate_and_leaves_the_logits_alone(logits: Logits, params: SamplingParams, step: int) -> None:
    before = logits.copy()
    chosen = Sampler(params).pick(logits, step)
    assert chosen in candidates(logits, params)[0]
    assert np.array_equal(before, logits)


@given(LOGITS, PARAMS)
def test_candidates_obey_every_filter(logits: Logits, params: SamplingParams) -> None:
    ids, probabilities = candidates(logits, params)
    assert len(ids) == len(set(ids.tolist())) >= 1
    assert probabilities.sum() == pytest.approx(1)
    assert int(logits.argmax()) in ids or logits[ids].max() == logits.max()
    assert params.top_k == 0 or len(ids) <= params.top_k
    assert probabilities.min() >= params.min_p * probabilities.max() * (1 - 1e-9)


@pytest.mark.parametrize("case", range(60))
def test_filters_keep_what_the_reference_library_keeps(case: int) -> None:
    """Same tokens and probabilities as the warpers of transformers, in its order."""
    rng = np.random.default_rng(case)
    logits = rng.normal(0, 3, size=400).astype(np.float32)
    params = SamplingParams(
        temperature=rng.uniform(0.2, 3),
        top_k=int(rng.integers(0, 200)),
        top_p=rng.uniform(0.1, 1),
        min_p=rng.uniform(0, 0.3),
    )
    steps: list[Any] = [reference.TemperatureLogitsWarper(params.temperature)]
    steps += [reference.TopKLogitsWarper(params.top_k)] if params.top_k else []
    steps += [reference.TopPLogitsWarper(params.top_p), reference.MinPLogitsWarper(params.min_p)]
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for step in steps:
        scores = step(None, scores)
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    ids, probabilities = candidates(logits, params)
    assert set(ids.tolist()) == set(np.flatnonzero(expected).tolist())
    assert probabilities == pytest.approx(expected[ids])


def test_nucleus_of_a_flat_distribution_is_searched_beyond_its_first_guess() -> None:
    ids, _ = candidates(np.zeros(5000, dtype=np.float32), SamplingParams(temperature=1, top_p=0.5))
    assert ids.tolist() == list(range(2500))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_random_number_depends_on_seed_and_position_only(seed: int, step: int) -> None:
    assert uniform(seed, step) == uniform(seed, step)
    assert 0 <= uniform(seed, step) < 1


def test_random_numbers_are_pinned() -> None:
    """A stored seed must give the same tokens in every later release."""
    assert [uniform(7, step) for step in range(3)] == [0.8720734548204873, 0.0828426870273763, 0.014107696329258346]


def test_requests_beside_each_other_draw_as_if_alone() -> None:
    """R-040: the result of a request depends on its own seed and positions, not on who shares the batch."""
    rows = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    params = [SamplingParams(temperature=1, seed=seed) for seed in range(4)]
    alone = [[Sampler(p).pick(row, step) for step, row in enumerate(rows)] for p in params]
    together = [Sampler(p) for p in params]
    mixed = [[sampler.pick(row, step) for sampler in together] for step, row in enumerate(rows)]
    assert [list(column) for column in zip(*mixed, strict=True)] == alone


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    sampler = Sampler(SamplingParams(temperature=1, seed=3))
    counts = np.bincount([sampler.pick(logits, step) for step in range(20_000)], minlength=3)
    assert counts / 20_000 == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_repetition_penalty_counts_prompt_and_generated_tokens() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2), seen=[0])
    assert [sampler.pick(logits, step) for step in range(2)] == [1, 0]
    assert Sampler(SamplingParams(repetition_penalty=2), seen=[]).pick(logits, 0) == 0


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_and_no_token(value: float, temperature: float) -> None:
    logits = np.full(4, value, dtype=np.float32)
    with pytest.raises(InternalError, match="finite"):
        Sampler(SamplingParams(temperature=temperature)).pick(logits, 0)


@given(LOGITS)
def test_log_probabilities_sum_to_one(logits: Logits) -> None:
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1)


@given(st.lists(st.floats(-40, 40, width=32), min_size=60, max_size=60), st.integers(1, 40))
def test_scored_rows_have_the_log_probability_of_their_token(values: list[float], count: int) -> None:
    rows = np.stack([np.roll(np.array(values, dtype=np.float32), shift) for shift in range(count)])
    tokens = [7 * row % 60 for row in range(count)]
    expected = [float(log_softmax(row)[token]) for row, token in zip(rows, tokens, strict=True)]
    assert token_logprobs(rows, tokens) == pytest.approx(expected, rel=1e-6, abs=1e-5)


@given(LOGITS, st.integers(0, 20))
def test_top_logprobs_are_the_best_in_order_with_ties_by_id(logits: Logits, count: int) -> None:
    logprobs = log_softmax(logits)
    expected = sorted(range(len(logits)), key=lambda id: (-logprobs[id], id))[:count]
    assert [id for id, _ in top_logprobs(logprobs, count)] == expected


def test_too_many_top_logprobs_name_the_range() -> None:
    with pytest.raises(BadSampling, match="0 to 20"):
        top_logprobs(np.zeros(3), 21)
