"""Compares a program's output with what is expected, outside the jail."""

from __future__ import annotations


def outputs_match(found: bytes, expected: bytes, *, is_exact: bool) -> bool:
    """Byte by byte if `is_exact`, else token by token, split at ASCII white space."""
    return found == expected if is_exact else found.split() == expected.split()
