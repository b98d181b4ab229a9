"""What a training will take, said before it starts, and held against what it took.

Time and memory follow from the pace of a shallow copy of the model, measured on the very machine (`pace.py`): every
further layer costs the same. Tokens follow from the order of the samples, to the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

MISS_SHARE: Final = 0.15
"""A forecast that is off by more than this share of itself has missed."""

QUIET_SHARE: Final = 0.9
"""Least share of a processor with which a pace counts as measured on a quiet machine."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds and bytes of a step, at the model's full depth."""

    step_s: float
    step_tokens: int
    """Tokens of the measured step."""
    memory_bytes: int
    """Peak beyond what the process holds before it loads a model."""
    processor_share: float = 1.0
    """Share of the step's time in which its main thread had a processor; well below 1 on a busy machine."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else held up what was measured."""
        return self.processor_share >= QUIET_SHARE


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes: seconds of its steps, peak memory, tokens through the model."""

    time_s: float
    memory_bytes: int
    tokens: int


def forecast(pace: Pace, tokens: int, processes: int = 1) -> Cost:
    """The cost of a run that sees that many tokens, shared by processes that each keep the pace."""
    time_s = tokens * pace.step_s / pace.step_tokens / processes
    return Cost(time_s=time_s, memory_bytes=pace.memory_bytes, tokens=tokens)


def learnt(known: Pace | None, took: Cost) -> Pace:
    """What a finished run adds to a pace: its own, where it was the faster one, and its peak.

    Other work only ever slows a step down, so of two paces the faster one is nearer to what the machine can do.
    """
    own = Pace(step_s=took.time_s, step_tokens=took.tokens, memory_bytes=took.memory_bytes)
    is_faster = known is None or own.step_s / own.step_tokens < known.step_s / known.step_tokens
    return own if is_faster or known is None else replace(known, memory_bytes=own.memory_bytes)


def at_depth(shallow: Mapping[str, Any], deep: Mapping[str, Any], layers: int) -> Pace:
    """The pace of `layers` layers from two measurements, each with its `layers`, `step_s` and so on."""
    further = (layers - deep["layers"]) / max(deep["layers"] - shallow["layers"], 1)

    def extended(key: str) -> float:
        return float(deep[key] + max(deep[key] - shallow[key], 0) * further)

    return Pace(
        step_s=extended("step_s"),
        step_tokens=deep["step_tokens"],
        memory_bytes=round(extended("memory_bytes")),
        processor_share=min(shallow["processor_share"], deep["processor_share"]),
    )


def missed(said: Cost, took: Cost) -> tuple[str, ...]:
    """Fields of the forecast that were off by more than MISS_SHARE of it."""
    pairs = ((name, value, getattr(took, name)) for name, value in asdict(said).items())
    return tuple(name for name, value, found in pairs if abs(found - value) > MISS_SHARE * value)
