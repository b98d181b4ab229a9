"""The mean of a number that two sides have for each of the same rows, compared in pairs: what differs between rows
cancels. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Z95 = 1.959963985
"""Standard deviations that hold 95 % of a normal distribution on both sides of its mean."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Held-out loss in nats a token, averaged over rows, and its change with a 95 % interval over paired rows."""

    before: float
    after: float
    change: float
    low: float
    high: float
    rows: int

    @property
    def is_better(self) -> bool:
        """Whether the loss fell by more than its uncertainty."""
        return self.high < 0


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """The comparison of the same rows, at least one, under two models; normal interval of the mean of differences."""
    changes = [own - other for own, other in zip(after, before, strict=True)]
    mean = fmean(changes)
    half = Z95 * stdev(changes, mean) / math.sqrt(len(changes)) if len(changes) > 1 else math.inf
    return Comparison(
        before=fmean(before),
        after=fmean(after),
        change=mean,
        low=mean - half,
        high=mean + half,
        rows=len(changes),
    )
