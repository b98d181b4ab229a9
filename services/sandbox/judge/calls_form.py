"""Tests as data: calls with their expected values, one Python literal a line, compared here with a tolerance.

A line is `(arguments, expected)` or `(arguments, keywords, expected)`. Nothing of it is executed.
"""

from __future__ import annotations

import ast
import functools
import marshal
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from services.sandbox.judge.handles import CallableHandle, handle_number
from services.sandbox.judge.outcome import Failed, Refused
from services.sandbox.judge.remote import Remote

_SHOWN_MAX_CHARS: Final = 100
_CACHED_SUITES: Final = 16


def run_calls(tests: str, remote: Remote, function: Any, tolerance: float) -> None:
    """Calls `function` line by line; Failed at the first value that differs, Refused for a line that is no call."""
    packed, expected = _parsed(tests)
    if not isinstance(function, CallableHandle):
        raise Failed("wrong", "the entry point is no function of the candidate's")
    found_values = remote.call_each(handle_number(function), packed)
    for number, (found, right) in enumerate(zip(found_values, expected, strict=True), 1):
        if not matches(found, right, tolerance):
            raise Failed("wrong", f"call {number} gives {_shown(found)} instead of {_shown(right)}")


def matches(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether `found` equals `expected`; with a tolerance, numbers inside may be that far off, and nan equals nan."""
    if found == expected:
        return True
    if tolerance == 0:
        return False
    if isinstance(expected, int | float | complex) and isinstance(found, int | float | complex):
        return _is_close(found, expected, tolerance)
    if type(found) is not type(expected) or isinstance(expected, str | bytes):
        return False
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(matches(found[key], expected[key], tolerance) for key in found)
    if isinstance(expected, Sequence):
        pairs = zip(found, expected, strict=False)
        return len(found) == len(expected) and all(matches(one, other, tolerance) for one, other in pairs)
    return False


def _is_close(found: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(found, complex) or isinstance(expected, complex):
        return bool(abs(found - expected) <= tolerance * max(1.0, abs(expected)))
    if found != found and expected != expected:
        return True
    try:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:
        return False


@functools.lru_cache(maxsize=_CACHED_SUITES)
def _parsed(tests: str) -> tuple[list[bytes], list[Any]]:
    """Arguments and keywords of each call, marshalled, and the expected value of each. Cached because the samples of
    one problem meet the same judge."""
    calls = [_call(number, line) for number, line in enumerate(tests.splitlines(), 1) if line.strip()]
    return [packed for packed, _ in calls], [expected for _, expected in calls]


def _call(number: int, line: str) -> tuple[bytes, Any]:
    try:
        parts = ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise Refused(f"line {number} of the calls is no Python literal: {error}") from error
    if not isinstance(parts, tuple) or len(parts) not in (2, 3):
        raise Refused(f"line {number} of the calls is not (arguments, expected) or (arguments, keywords, expected)")
    arguments, keywords, expected = parts if len(parts) == 3 else (parts[0], {}, parts[1])
    if not isinstance(arguments, list | tuple) or not isinstance(keywords, dict):
        raise Refused(f"line {number} of the calls: arguments are a list or tuple, keywords a dict")
    return marshal.dumps((arguments, keywords)), expected


def _shown(value: Any) -> str:
    """The value's text. An object of the candidate's has none: while calls are ahead, it cannot be asked."""
    try:
        text = repr(value)
    except RuntimeError:
        text = "an object"
    return text if len(text) <= _SHOWN_MAX_CHARS else text[:_SHOWN_MAX_CHARS] + "..."
