"""How the next token is chosen from logits: pure numpy, one request at a time, no state that a batch could leak into.

The filters run in the order of `transformers`: repetition penalty, temperature, top-k, top-p,
min-p. A draw depends only on the logits, the seed and the position: the random number comes from Philox (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011), seed as key and position as counter. So a request gives
the same tokens alone or beside others, and after a restart in the middle, as far as the logits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from smeltkit import limits
from smeltkit.errors import BadSampling, InternalError

TEMPERATURE_MIN: Final = 0.01
TEMPERATURE_MAX: Final = 10.0
PENALTY_MIN: Final = 0.1
PENALTY_MAX: Final = 10.0
SEED_MAX: Final = 2**64 - 1
_NUCLEUS_GUESS: Final = 256
_SCORED_ROWS: Final = 16

Logits = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; a value outside its range is BadSampling, never clipped."""

    temperature: float = 0.0
    """0 is greedy; else 0.01 to 10, which the logits are divided by."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to this, above 0 to 1."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the best one's probability, 0 to 1."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens seen before are divided by it, negative ones multiplied; 0.1 to 10, 1 is off."""
    seed: int = 0
    """Seed of this request, 0 to 2**64 - 1."""

    def __post_init__(self) -> None:
        warm = TEMPERATURE_MIN <= self.temperature <= TEMPERATURE_MAX
        _check(
            "temperature",
            self.temperature,
            self.temperature == 0 or warm,
            f"0 (greedy) or {TEMPERATURE_MIN} to {TEMPERATURE_MAX:g}",
        )
        _check("top_k", self.top_k, self.top_k >= 0, "0 (keep all) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (keep all)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (keep all) to 1")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            PENALTY_MIN <= self.repetition_penalty <= PENALTY_MAX,
            f"{PENALTY_MIN} to {PENALTY_MAX:g}; 1 is off",
        )
        _check("seed", self.seed, 0 <= self.seed <= SEED_MAX, f"0 to {SEED_MAX}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def to_dict(self) -> dict[str, Any]:
        """Every effective value by name."""
        return asdict(self)


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, params: SamplingParams, seen: Iterable[int] = ()) -> None:
        """`seen`: ids of the prompt, which the repetition penalty counts like generated ones."""
        self.params = params
        self._is_penalized = params.repetition_penalty != 1
        self._seen = set(seen) if self._is_penalized else set()

    def pick(self, logits: Logits, step: int) -> int:
        """The id of the token at position `step` (0 for the first generated), from `logits` (vocab,) float32.

        The array is not changed. InternalError if no logit is finite: the engine is broken, and a token drawn from
        such numbers would look like an answer.
        """
        if self._is_penalized:
            logits = self._penalize(logits)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise InternalError("the engine returned logits without a finite maximum, so no token can be chosen")
        chosen = best if self.params.is_greedy else self._draw(logits, step)
        if self._is_penalized:
            self._seen.add(chosen)
        return chosen

    def _penalize(self, logits: Logits) -> Logits:
        """CTRL's penalty (Keskar et al., 2019, section 4.1), as in the reference library."""
        if not self._seen:
            return logits
        ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
        penalized, penalty = logits.copy(), np.float32(self.params.repetition_penalty)
        values = penalized[ids]
        penalized[ids] = np.where(values < 0, values * penalty, values / penalty)
        return penalized

    def _draw(self, logits: Logits, step: int) -> int:
        ids, probabilities = candidates(logits, self.params)
        cumulative = np.cumsum(probabilities)
        point = uniform(self.params.seed, step) * cumulative[-1]
        return int(ids[min(int(np.searchsorted(cumulative, point, side="right")), len(ids) - 1)])


def candidates(logits: Logits, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids (n,) that survive the filters and their probabilities (n,) float64, which sum to 1; at least one id.

    `params.temperature` must be above 0. Equal logits are ordered by id, so that a tie is cut the same way everywhere.
    """
    scaled = logits.astype(np.float64) / params.temperature
    ids = np.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        ids = _best(scaled, params.top_k)
    weights = np.exp(scaled[ids] - scaled[ids].max())
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) of a seed and a position: 53 bits of the first Philox4x64-10 output."""
    raw = np.random.Philox(key=seed, counter=step).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Natural log-probabilities (vocab,) float64 of `logits`, by the shifted form that cannot overflow."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def token_logprobs(logits: Logits, tokens: Sequence[int]) -> list[float]:
    """Natural log-probability that each row of `logits` (n, vocab) float32 gives to its token of `tokens` (n,).

    Exponentials in float32 and their sums in float64, a few rows at a time: a tenth of what whole rows in float64 cost,
    and right to about 1e-6.
    """
    found: list[float] = []
    for begin in range(0, len(tokens), _SCORED_ROWS):
        rows, chosen = logits[begin : begin + _SCORED_ROWS], tokens[begin : begin + _SCORED_ROWS]
        shifted = rows - rows.max(axis=1, keepdims=True)
        picked = shifted[np.arange(len(chosen)), chosen].astype(np.float64)
        found += (picked - np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))).tolist()
    return found


def top_logprobs(logprobs: NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """The `count` most likely ids with their log-probabilities, best first, ties by id; BadSampling above the bound."""
    _check("logprobs", count, 0 <= count <= limits.TOP_LOGPROBS_MAX, f"0 to {limits.TOP_LOGPROBS_MAX}")
    return [(int(id), float(logprobs[id])) for id in _best(logprobs, min(count, len(logprobs)))]


def _best(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, ties by index; linear in the vocabulary."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > threshold)
    tied = np.flatnonzero(values == threshold)[: count - len(above)]
    found: NDArray[np.int64] = np.concatenate([above, tied])
    return found[np.lexsort((found, -values[found]))]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indices of the smallest set of largest weights that holds `top_p` of their sum (Holtzman et al., 2020).

    Sorts a short head first: most of the mass sits in few tokens, and sorting a whole vocabulary would cost more than
    all the rest of sampling.
    """
    goal, count = top_p * weights.sum(), min(_NUCLEUS_GUESS, len(weights))
    while True:
        head = _best(weights, count)
        cumulative = np.cumsum(weights[head])
        if cumulative[-1] >= goal or count == len(weights):
            return head[: 1 + int(np.searchsorted(cumulative, goal, side="left"))]
        count = min(8 * count, len(weights))


def _check(name: str, value: float, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise BadSampling(f"{name}={value:g} is out of range; allowed: {allowed}", details={"field": name})
