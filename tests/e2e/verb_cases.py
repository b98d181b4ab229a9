"""The cases of the command line's verbs: what is done with each, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.conftest import BASIC

SMALL = "ore-11m:q8_0"
SUITE = ("--suite", "basic", "--data", str(BASIC))
CASES: dict[str, Callable[..., None]] = {}


def case(verb: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares what is done with a verb, and what must come of it."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        CASES[verb] = function
        return function

    return declare
