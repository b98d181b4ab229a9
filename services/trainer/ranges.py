"""Ranges of settings: each check names the setting, its value and what is allowed."""

from __future__ import annotations

from smeltkit.errors import BadConfig


def among(name: str, value: str, known: tuple[str, ...]) -> None:
    """BadConfig unless the value is one of those known."""
    if value not in known:
        raise BadConfig(f"{name}={value!r} must be one of {', '.join(known)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """BadConfig unless the value lies between `low` and `high`, both allowed."""
    if not low <= value <= high:
        raise BadConfig(f"{name}={value} must be {low:g} to {high:g}")


def below_one(name: str, value: float) -> None:
    """BadConfig unless the value is 0 to below 1."""
    if not 0 <= value < 1:
        raise BadConfig(f"{name}={value} must be 0 to below 1")
