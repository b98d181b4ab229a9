"""What a training holds at most, beside what its process held before."""

from __future__ import annotations

from services.trainer.costs.peak import PeakMemory

MIB = 1 << 20


def _touch(size_bytes: int) -> None:
    """Memory that was really there, and is gone."""
    held = bytearray(size_bytes)
    held[::4096] = b"x" * len(held[::4096])


def test_only_what_was_held_since_counts() -> None:
    """R-068: what was taken and given back before a training began is no part of what it needed."""
    _touch(256 * MIB)
    peak = PeakMemory("cpu")
    assert peak.bytes < 128 * MIB
    _touch(192 * MIB)
    assert 128 * MIB < peak.bytes < 256 * MIB
