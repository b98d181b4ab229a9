"""Failures of what the platform stands on, counted by their reason where they are met."""

from __future__ import annotations

from typing import TypeVar

from smeltkit.errors import FileChanged, SmeltError
from smeltkit.telemetry import names
from smeltkit.telemetry.metrics import counter

E = TypeVar("E", bound=Exception)


def counted(error: E) -> E:
    """`error` itself, counted if the dependency failed; that a file is not there, or changed while sent, is none."""
    if isinstance(error, SmeltError) and not isinstance(error, FileChanged):
        counter(names.DEPENDENCY_FAILURES).add(1, {names.ERROR_TYPE: error.reason()})
    return error
