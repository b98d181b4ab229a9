"""Ranges of settings: each check names the setting, its value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from smeltkit.errors import BadConfig


def among(name: str, value: str, known: tuple[str, ...], meant: Mapping[str, str] | None = None) -> None:
    """BadConfig unless the value is one of those known; with what is `meant` by one that has another place."""
    if value not in known:
        hint = f"; write {meant[value]}" if meant and value in meant else ""
        raise BadConfig(f"{name}={value!r} must be one of {', '.join(known)}{hint}")


def revision(name: str, value: str) -> None:
    """BadConfig unless the value is a revision of code as `code_revision` makes them, or empty."""
    if value and not re.fullmatch("[0-9a-f]{12}", value):
        raise BadConfig(f"{name}={value!r} must be twelve hex digits, as the plan of a training tells them")


def within(name: str, value: float, low: float, high: float) -> None:
    """BadConfig unless the value lies between `low` and `high`, both allowed."""
    if not low <= value <= high:
        raise BadConfig(f"{name}={value} must be {low:g} to {high:g}")


def below_one(name: str, value: float) -> None:
    """BadConfig unless the value is 0 to below 1."""
    if not 0 <= value < 1:
        raise BadConfig(f"{name}={value} must be 0 to below 1")
