"""What a comparison may be asked to show: whoever asks has a gate on the paired test."""

from __future__ import annotations

from typing import Final

from smelt.evaluator.v1 import evaluator_pb2

from smeltkit.errors import BadGate

_MET: Final = {"better": ("better",), "not-worse": ("better", "no difference shown")}
"""Demand to the verdicts that meet it."""


def check_demand(text: str) -> str:
    """`text` if it is a demand, or empty for none; BadGate."""
    if text and text not in _MET:
        raise BadGate(f"must={text!r} is no demand on a comparison; allowed are {' and '.join(_MET)}")
    return text


def is_met(demand: str, found: evaluator_pb2.CompareResponse) -> bool:
    """Whether the comparison shows what is demanded; without a demand it always does."""
    return not demand or found.verdict in _MET[demand]
