"""Estimates and their uncertainty: pass@k, 95 % intervals, paired tests. Pure functions, standard library only.

What is random is the choice of problems; samples of one problem belong together, so every interval treats a problem as
one observation however many samples it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

Z_95 = 1.959963984540054
SIGNIFICANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A paired difference of pass@1, candidate less baseline, and what may be said about it."""

    difference: Estimate
    p_value: float
    verdict: str
    """"better", "worse" or "no difference shown"."""


def pass_at_k(samples: int, passed: int, k: int) -> Fraction:
    """The unbiased estimate of the chance that at least one of `k` samples passes, exact: 1 - C(n-c, k) / C(n, k).

    After Chen et al. 2021 (arXiv:2107.03374), section 2.1. ValueError unless 0 <= passed <= samples, 1 <= k <= samples.
    """
    if not (0 <= passed <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {passed} passed in {samples} samples is not defined")
    return 1 - Fraction(math.comb(samples - passed, k), math.comb(samples, k))


def mean_estimate(rates: Sequence[Fraction]) -> Estimate:
    """The mean of one rate a problem, each 0 to 1, with a 95 % interval; ValueError for no problem.

    Wilson's score interval at the effective number of trials, value * (1 - value) / (variance of the mean, problems
    being clusters): for rates of 0 and 1 alone, so for one sample a problem, that is Wilson's interval itself. It lies
    within 0 and 1 and has a width at 0 and at 1 too, where a bootstrap has none.
    """
    if not rates:
        raise ValueError("an estimate needs at least one problem")
    count = len(rates)
    value = sum(rates, Fraction()) / count
    squares = sum(((rate - value) ** 2 for rate in rates), Fraction())
    between, within = squares / count**2, value * (1 - value)
    trials = float(within / between) if between else float(count)
    low, high = wilson(float(value), trials)
    return Estimate(value=float(value), low=low, high=high)


def wilson(value: float, trials: float) -> tuple[float, float]:
    """The ends of Wilson's 95 % score interval of a share `value` in `trials` trials (Wilson 1927)."""
    square = Z_95**2 / trials
    centre = (value + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * math.sqrt(value * (1 - value) / trials + square / (4 * trials))
    return max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))


def compare(baseline: Sequence[Fraction], candidate: Sequence[Fraction]) -> Comparison:
    """The paired comparison of one rate a problem; "better" and "worse" need both the test and the interval.

    ValueError unless both have the same number of problems, at least one (R-008).
    """
    if not baseline or len(baseline) != len(candidate):
        raise ValueError(f"cannot pair {len(baseline)} with {len(candidate)} problems")
    differences = [new - old for old, new in zip(baseline, candidate, strict=True)]
    difference = _difference_estimate(baseline, candidate, differences)
    p_value = paired_p_value(differences)
    verdict = "no difference shown"
    if p_value < SIGNIFICANCE and (difference.low > 0 or difference.high < 0):
        verdict = "better" if difference.value > 0 else "worse"
    return Comparison(difference=difference, p_value=p_value, verdict=verdict)


def paired_p_value(differences: Sequence[Fraction]) -> float:
    """The exact two-sided p-value that paired `differences` are symmetric around zero.

    The sign-flip (permutation) test, by counting all 2^m sign patterns of the m non-zero differences over their common
    denominator. For differences of -1, 0 and 1 it is McNemar's exact test.
    """
    scale = math.lcm(*(difference.denominator for difference in differences)) if differences else 1
    steps = [abs(int(difference * scale)) for difference in differences if difference]
    total = sum(steps)
    observed = abs(int(sum(differences) * scale))
    # Bit-packed counts: digit s of `patterns`, of `width` bits, counts the patterns whose positive part sums to s.
    width = len(steps) + 1
    patterns = 1
    for step in steps:
        patterns += patterns << (step * width)
    digit = (1 << width) - 1
    extreme = sum(
        (patterns >> (positive * width)) & digit
        for positive in range(total + 1)
        if abs(2 * positive - total) >= observed
    )
    return float(Fraction(extreme, 1 << len(steps)))


def _difference_estimate(
    baseline: Sequence[Fraction], candidate: Sequence[Fraction], differences: Sequence[Fraction]
) -> Estimate:
    """The mean difference with the square-and-add interval of two correlated shares.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10 without its continuity correction: each mean's own
    interval gives the deviations, the correlation over problems joins them.
    """
    old, new = mean_estimate(baseline), mean_estimate(candidate)
    value = float(sum(differences, Fraction()) / len(differences))
    correlation = _correlation(baseline, candidate)
    down = _joined(new.value - new.low, old.high - old.value, correlation)
    up = _joined(new.high - new.value, old.value - old.low, correlation)
    return Estimate(value=value, low=max(-1.0, value - down), high=min(1.0, value + up))


def _joined(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))


def _correlation(xs: Sequence[Fraction], ys: Sequence[Fraction]) -> float:
    """Pearson's correlation, 0 where one of the two never varies."""
    count = len(xs)
    mean_x, mean_y = sum(xs, Fraction()) / count, sum(ys, Fraction()) / count
    cross = sum(((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)), Fraction())
    square_x = sum(((x - mean_x) ** 2 for x in xs), Fraction())
    square_y = sum(((y - mean_y) ** 2 for y in ys), Fraction())
    return float(cross) / math.sqrt(float(square_x) * float(square_y)) if square_x and square_y else 0.0
