"""What more tokens would bring: a scaling law through the held-out losses of a run.

    L(D) = E + A D^-alpha        D tokens seen; E, A and alpha not below 0

Kaplan et al. (arXiv:2001.08361), with the floor E of Hoffmann et al. (arXiv:2203.15556). For each exponent of a grid E
and A follow by least squares; the exponent with the smallest rest is taken. Intervals hold 95 % of fits to samples
drawn anew, with the rest of the fit as noise where there are more than three points. That the course goes on as it did
is an assumption: a learning rate that comes down makes the end of a run steeper than what would follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from services.trainer.run.measured import Measured
from smeltkit.paired import compare

POINTS_MIN: Final = 3
"""Measurements after the first step without which nothing is fitted."""
FARTHEST: Final = 10
"""Times the tokens seen beyond which nothing is said of further ones."""
_EXPONENTS: Final = np.geomspace(0.05, 2.0, 256)
_DRAWS: Final = 400
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much the held-out loss would fall with further tokens, with a 95 % interval."""

    tokens: int
    """Further ones."""
    gain: float
    """In nats a token."""
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A fitted law and what follows from it."""

    points: int
    """Measurements that it was fitted to."""
    floor: float
    """E: the loss that no number of tokens goes below."""
    floor_low: float
    floor_high: float
    exponent: float
    exponent_low: float
    exponent_high: float
    again: Gain
    """As many tokens again as the run has seen."""
    hour_tokens: int | None
    """Tokens of an hour at the run's speed; None where that is not known."""
    hour: Gain | None
    """What these would bring; None where they are more than FARTHEST times those seen, or not known."""
    resolution: float
    """Smallest change that these samples tell from noise: half the interval of that between the last two points."""

    @property
    def is_worth_it(self) -> bool:
        """Whether as many tokens again would bring more than the held-out samples can tell."""
        return self.again.gain > self.resolution

    @property
    def advice(self) -> str:
        """A line for people."""
        said = f"as many tokens again: {_text(self.again)}"
        if self.hour_tokens is not None:
            far = f"too far from the {self.again.tokens:,} that were measured"
            said += f"; an hour more ({self.hour_tokens:,} tokens): {_text(self.hour) if self.hour else far}"
        if self.is_worth_it:
            return said
        return (
            f"{said}: stop, {self.points} measurements expect less than these samples can tell ({self.resolution:.4f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "is_worth_it": self.is_worth_it, "advice": self.advice}


def outlook(measured: Sequence[Measured], tokens_per_second: float | None = None) -> Outlook | None:
    """The law through the measurements after the first step, of rows of one run; None for fewer than POINTS_MIN."""
    points = [one for one in measured if one.step > 0]
    if len(points) < POINTS_MIN:
        return None
    rows = np.array([one.losses for one in points])
    seen = np.array([one.tokens for one in points], dtype=np.float64)
    floor, scale, exponent, rest = _fitted(seen, rows.mean(axis=1)[None])
    noise = np.sqrt(rest[0] / (len(points) - POINTS_MIN)) if len(points) > POINTS_MIN else 0.0
    drawn = _fitted(seen, _drawn(rows, noise))[:3]
    found, last = (floor, scale, exponent), seen[-1]

    def gain(further: int) -> Gain:
        many = _gains(*drawn, last, further)
        low, high = np.percentile(many, [2.5, 97.5])
        return Gain(tokens=further, gain=float(_gains(*found, last, further)[0]), low=float(low), high=float(high))

    hour_tokens = round(tokens_per_second * 3600) if tokens_per_second else None
    bounds = [np.percentile(values, [2.5, 97.5]) for values in (drawn[0], drawn[2])]
    ends = compare(points[-2].losses, points[-1].losses)
    return Outlook(
        points=len(points),
        floor=float(floor[0]),
        floor_low=float(bounds[0][0]),
        floor_high=float(bounds[0][1]),
        exponent=float(exponent[0]),
        exponent_low=float(bounds[1][0]),
        exponent_high=float(bounds[1][1]),
        again=gain(int(last)),
        hour_tokens=hour_tokens,
        hour=gain(hour_tokens) if hour_tokens and hour_tokens <= FARTHEST * last else None,
        resolution=(ends.high - ends.low) / 2,
    )


def _drawn(rows: _Floats, noise: float) -> _Floats:
    """Mean losses of every point, _DRAWS times, over rows drawn anew (the same at each point), with noise added."""
    generator = np.random.Generator(np.random.PCG64(0))
    count = rows.shape[1]
    shares = generator.multinomial(count, np.full(count, 1 / count), size=_DRAWS) / count
    means: _Floats = shares @ rows.T
    return means + generator.normal(0.0, 1.0, means.shape) * noise


def _fitted(seen: _Floats, losses: _Floats) -> tuple[_Floats, _Floats, _Floats, _Floats]:
    """E, A, alpha and the squared rest of each row of `losses`, measured after `seen` tokens; A is of D by the last."""
    bases = (seen / seen[-1]) ** -_EXPONENTS[:, None]
    x, mean_x = bases - bases.mean(axis=1, keepdims=True), bases.mean(axis=1)
    mean_l = losses.mean(axis=1)
    scale = np.maximum((losses - mean_l[:, None]) @ x.T / (x**2).sum(axis=1), 0.0)
    floor = mean_l[:, None] - scale * mean_x
    through_zero = losses @ bases.T / (bases**2).sum(axis=1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0.0)
    rest = ((losses[:, None] - floor[..., None] - scale[..., None] * bases) ** 2).sum(axis=2)
    best = rest.argmin(axis=1)
    each = np.arange(len(losses))
    return floor[each, best], scale[each, best], _EXPONENTS[best], rest[each, best]


def _gains(floor: _Floats, scale: _Floats, exponent: _Floats, last: float, further: int) -> _Floats:
    """By how much each law falls from the last point to `further` tokens after it."""
    return scale * (1 - ((last + further) / last) ** -exponent)


def _text(gain: Gain) -> str:
    return f"{-gain.gain:+.4f} [{-gain.high:+.4f}, {-gain.low:+.4f}]"
