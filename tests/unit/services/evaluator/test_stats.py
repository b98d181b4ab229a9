"""Estimates against oracles that count: exact integers for pass@k, enumeration for tests, simulation for intervals."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator.stats import compare, mean_estimate, paired_p_value, pass_at_k, wilson

F = Fraction


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int) -> None:
    """The oracle draws every set of k samples and counts, in integers."""
    for passed in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(range(samples), k))
            hits = sum(any(index < passed for index in draw) for draw in draws)
            assert pass_at_k(samples, passed, k) == F(hits, len(draws))


@given(st.integers(1, 60), st.data())
def test_pass_at_k_grows_with_k_and_with_what_passed(samples: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    value = pass_at_k(samples, passed, k)
    assert 0 <= value <= 1
    assert pass_at_k(samples, passed, 1) == F(passed, samples)
    if k < samples:
        assert pass_at_k(samples, passed, k + 1) >= value
    if passed < samples:
        assert pass_at_k(samples, passed + 1, k) >= value


@pytest.mark.parametrize(("samples", "passed", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_pass_at_k_outside_of_its_domain_is_refused(samples: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, passed, k)


def test_one_sample_a_problem_gives_wilsons_interval() -> None:
    """139 of 200, against the closed form evaluated by hand."""
    estimate = mean_estimate([F(1)] * 139 + [F(0)] * 61)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.695, 0.628014, 0.754636), abs=1e-6)


@pytest.mark.parametrize(("passed", "low", "high"), [(0, 0.0, 0.277533), (10, 0.722467, 1.0)])
def test_none_and_all_have_an_interval_too(passed: int, low: float, high: float) -> None:
    estimate = mean_estimate([F(1)] * passed + [F(0)] * (10 - passed))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Exact coverage at n = 40, averaged over the truth: the sum of binomial probabilities of intervals that cover."""
    covered = []
    for truth in (step / 100 for step in range(2, 100, 2)):
        chances = (math.comb(40, k) * truth**k * (1 - truth) ** (40 - k) for k in range(41))
        inside = (wilson(k / 40, 40)[0] <= truth <= wilson(k / 40, 40)[1] for k in range(41))
        covered.append(sum(chance for chance, is_in in zip(chances, inside, strict=True) if is_in))
    assert 0.94 < sum(covered) / len(covered) < 0.97
    assert min(covered) > 0.88


def test_more_samples_of_the_same_problems_do_not_pretend_to_be_more_problems() -> None:
    """20 samples of 50 problems that each always pass or never: the interval stays that of 50 trials."""
    rates = [F(1)] * 20 + [F(0)] * 30
    clustered, single = mean_estimate(rates), wilson(0.4, 50)
    assert (clustered.low, clustered.high) == pytest.approx(single)


def test_the_interval_of_several_samples_agrees_with_a_bootstrap_over_problems() -> None:
    """The oracle resamples problems; both ends agree to a tenth of the width."""
    source = random.Random(7)
    rates = [
        F(sum(source.random() < chance for _ in range(10)), 10) for chance in (source.random() for _ in range(200))
    ]
    means = sorted(float(sum(source.choices(rates, k=200))) / 200 for _ in range(2000))
    low, high = means[50], means[1949]
    estimate = mean_estimate(rates)
    assert estimate.low == pytest.approx(low, abs=(high - low) / 10)
    assert estimate.high == pytest.approx(high, abs=(high - low) / 10)


def test_an_estimate_of_no_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        mean_estimate([])


@given(st.lists(st.integers(-4, 4), max_size=10))
def test_the_paired_p_value_counts_every_sign_pattern(steps: list[int]) -> None:
    differences = [F(step, 4) for step in steps]
    observed = abs(sum(steps))
    patterns = list(itertools.product((-1, 1), repeat=len(steps)))
    extreme = sum(
        abs(sum(sign * step for sign, step in zip(signs, steps, strict=True))) >= observed for signs in patterns
    )
    assert paired_p_value(differences) == pytest.approx(extreme / len(patterns))


@pytest.mark.parametrize(("gained", "lost"), [(30, 12), (5, 0), (6, 0), (1, 1), (0, 0), (17, 3)])
def test_one_sample_a_problem_gives_mcnemars_exact_test(gained: int, lost: int) -> None:
    discordant = gained + lost
    tail = sum(math.comb(discordant, i) for i in range(min(gained, lost) + 1))
    expected = min(1.0, 2 * tail / 2**discordant)
    differences = [F(1)] * gained + [F(-1)] * lost + [F(0)] * 100
    assert paired_p_value(differences) == pytest.approx(expected)


def _results(both: int, only_old: int, only_new: int, neither: int) -> tuple[list[Fraction], list[Fraction]]:
    old = [F(1)] * both + [F(1)] * only_old + [F(0)] * only_new + [F(0)] * neither
    new = [F(1)] * both + [F(0)] * only_old + [F(1)] * only_new + [F(0)] * neither
    return old, new


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, table II, method 10, the row 36, 12, 2, 0 of 50: 0.20 with 0.0569 to 0.3404."""
    old, new = _results(both=36, only_old=2, only_new=12, neither=0)
    difference = compare(old, new).difference
    assert difference.value == pytest.approx(0.20)
    assert (difference.low, difference.high) == pytest.approx((0.0569, 0.3404), abs=0.0001)


@pytest.mark.parametrize(
    ("cells", "verdict"),
    [
        ((100, 5, 30, 65), "better"),
        ((100, 30, 5, 65), "worse"),
        ((100, 12, 15, 73), "no difference shown"),
        ((160, 0, 4, 0), "no difference shown"),
        ((164, 0, 0, 0), "no difference shown"),
    ],
)
def test_a_difference_is_claimed_only_where_it_is_shown(cells: tuple[int, int, int, int], verdict: str) -> None:
    """R-092: three or four problems more are inside the noise."""
    comparison = compare(*_results(*cells))
    assert comparison.verdict == verdict
    if verdict == "better":
        assert comparison.difference.low > 0
        assert comparison.p_value < 0.05


def test_a_comparison_of_nothing_is_refused() -> None:
    """R-008."""
    with pytest.raises(ValueError, match="cannot pair 0 with 0"):
        compare([], [])
    with pytest.raises(ValueError, match="cannot pair 1 with 2"):
        compare([F(1)], [F(1), F(0)])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_a_comparison_reversed_is_its_mirror_image(pairs: list[tuple[int, int]]) -> None:
    old, new = [F(a, 3) for a, _ in pairs], [F(b, 3) for _, b in pairs]
    there, back = compare(old, new), compare(new, old)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.difference.low == pytest.approx(-back.difference.high)
    assert there.difference.low <= there.difference.value + 1e-12
    assert there.difference.value <= there.difference.high + 1e-12
