"""Successive halving: runs of a sweep that are stopped early, the worst by held-out loss first. Nothing here talks to
anybody.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (arXiv:1502.07943): all
runs take the steps of the first rung, the best of them go on to the next, which has `eta` times as many, and so on to
the end. A run that goes on is never begun again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

from smeltkit.errors import BadConfig
from smeltkit.paired import compare

ETA_MAX: Final = 16


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Where runs are compared."""

    steps: int
    """Steps that each of its runs has done by then."""
    runs: int
    """Runs that take part."""
    kept: int
    """Of these, how many go on; of the last rung the one that is best."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a sweep takes if nothing of it is stored; tokens and time from those of whole runs, on average."""

    steps: int
    tokens: int
    time_s: float | None
    """Of its steps, one run after the other; None where no pace is known."""


def rungs_of(sweep: Mapping[str, Any], runs: int, steps: int) -> list[Rung]:
    """The rungs of that many runs of that many steps; the last is the end. BadConfig names what does not fit.

    `eta` is 3 unless said, and `first_steps` such that one run is left for the last rung.
    """
    eta = _whole("eta", sweep.get("eta", 3), 2, ETA_MAX)
    cuts = 1
    while eta ** (cuts + 1) <= runs:
        cuts += 1
    first = _whole("first_steps", sweep.get("first_steps", max(steps // eta**cuts, 1)), 1, max(steps - 1, 1))
    found, alive, done = [], runs, first
    while alive > 1 and done < steps:
        kept = max(alive // eta, 1)
        found.append(Rung(steps=done, runs=alive, kept=kept))
        alive, done = kept, done * eta
    return [*found, Rung(steps=steps, runs=alive, kept=1)]


def cost_of(rungs: Sequence[Rung], tokens: Sequence[int], times_s: Sequence[float]) -> Cost:
    """The cost of the rungs from the tokens of each run to its end, and the seconds of those where they are known."""
    before = [0, *(rung.steps for rung in rungs)]
    steps = sum(rung.runs * (rung.steps - done) for rung, done in zip(rungs, before, strict=False))
    runs = steps / rungs[-1].steps
    return Cost(steps=steps, tokens=round(runs * fmean(tokens)), time_s=runs * fmean(times_s) if times_s else None)


def cut(losses: Mapping[str, Sequence[float]], kept: int) -> dict[str, dict[str, Any]]:
    """The runs that are stopped, of those named with their losses row by row: the `kept` best by the mean go on.

    Each with its `loss`, the last of those that go on (`against`), and by how much it is worse, in pairs of rows.
    """
    ordered = sorted(losses, key=lambda name: fmean(losses[name]))
    last = ordered[:kept][-1]
    return {
        name: {"loss": fmean(losses[name]), "against": last, **beside(losses[last], losses[name])}
        for name in ordered[kept:]
    }


def beside(best: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """By how much the loss of a run exceeds that of a better one on the same rows, and whether that is noise."""
    found = asdict(compare(best, other))
    return {key: found[key] for key in ("change", "low", "high", "rows")} | {"is_noise": found["low"] <= 0}


def stopped_text(name: str, steps: int, found: Mapping[str, Any]) -> str:
    """A line for people about a run that was stopped."""
    noise = "; that is within noise, so it might as well have gone on" if found["is_noise"] else ""
    return (
        f"{name} is stopped after {steps} steps: held-out loss {found['loss']:.4f}, {found['change']:+.4f}"
        f" [{found['low']:+.4f}, {found['high']:+.4f}] beside {found['against']}{noise}"
    )


def _whole(key: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadConfig(f"sweep.{key}={value!r} must be a whole number, {low} to {high}")
    return value
