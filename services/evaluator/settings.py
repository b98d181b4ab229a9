"""The settings of one evaluation, checked; and R-007: what was used must be what was asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.errors import BadRequest, BadSampling, SettingsDiffer, UnsupportedOption

_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a suite is sampled. Values are those in force: 0 has been replaced by what it stands for."""

    samples: int
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    problems: int
    """Problems that are run, from the first; fewer than the split has make the score partial."""

    @classmethod
    def checked(
        cls,
        suite: Suite,
        *,
        samples: int,
        temperature: float,
        top_p: float,
        seed: int,
        max_tokens: int,
        limit: int,
        has_thinking: bool = False,
    ) -> Settings:
        """Settings in force for a request; 0 for `samples`, `top_p`, `max_tokens` or `limit` means the default.

        The default of `max_tokens` is the suite's room for an answer, and its room for reasoning if `has_thinking`.

        BadRequest, BadSampling or UnsupportedOption name the field, the value and the range. The float32 of the wire
        is rounded to six digits, so that 0.8 is recorded as 0.8.
        """
        _check_range("samples", samples, 0, limits.EVALUATION_SAMPLES_MAX)
        _check_range("max_tokens", max_tokens, 0, limits.EVALUATION_TOKENS_MAX)
        _check_range("limit", limit, 0, suite.problems)
        _check_range("samples * problems", samples * (limit or suite.problems), 0, limits.EVALUATION_COMPLETIONS_MAX)
        temperature, top_p = round(temperature, 6), round(top_p, 6) or 1.0
        if temperature != 0 and not 0.01 <= temperature <= 10:
            raise BadSampling(f"temperature={temperature:g} must be 0 (greedy) or 0.01 to 10")
        if not 0 < top_p <= 1:
            raise BadSampling(f"top_p={top_p:g} must be above 0 and at most 1")
        if temperature == 0 and samples > 1:
            raise BadRequest(f"samples={samples} with temperature 0 are {samples} times the same; set a temperature")
        if temperature == 0 and top_p != 1:
            raise UnsupportedOption(
                f"top_p={top_p:g} has no effect at temperature 0; leave it out or set a temperature"
            )
        return cls(
            samples=samples or 1,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens or suite.max_tokens + has_thinking * suite.thinking_tokens,
            problems=limit or suite.problems,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            "samples": self.samples,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "problems": self.problems,
        }


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """The seed of one sample, 0 to 2**63 - 1: independent of order, concurrency and of the other problems."""
    digest = hashlib.sha256(f"{seed}:{problem}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SEEDS


def check_effective(requested: Mapping[str, Any], effective: Mapping[str, Any]) -> None:
    """Raises SettingsDiffer unless every requested setting was in force."""
    for name, value in requested.items():
        used = effective.get(name)
        is_same = abs(used - value) <= 1e-6 if isinstance(value, float) and isinstance(used, float) else used == value
        if not is_same:
            raise SettingsDiffer(
                f"{name}={value} was requested, but inference used {used}; the score would be of something else",
                details={"setting": name, "requested": str(value), "effective": str(used)},
            )


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadRequest(f"{name}={value} must be {low} to {high}")
