"""Counts the work of one template render, and makes its texts: nothing here grows past a bound before it is counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any, Final

import jinja2.exceptions

from smeltkit import limits

CHARS_PER_STEP: Final = 64
_JSON_STEPS: Final = 8


class Exceeded(jinja2.exceptions.SecurityError):
    """The template did more work, or made more text, than one render may."""


class Meter:
    """Work and text of one render. A step is about a microsecond: a node visited, or 64 characters handled."""

    def __init__(self) -> None:
        self._steps_left = limits.TEMPLATE_STEPS_MAX
        self._chars_left = limits.TEMPLATE_OUTPUT_MAX_CHARS

    def spend(self, steps: int) -> None:
        """Counts `steps`; raises Exceeded when they are used up."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise Exceeded(f"the template runs longer than {limits.TEMPLATE_STEPS_MAX} steps")

    def touch(self, *values: Any) -> None:
        """Counts what one pass over each value costs; nested containers are not entered."""
        for value in values:
            if isinstance(value, str):
                self.spend(1 + len(value) // CHARS_PER_STEP)
            elif isinstance(value, list | tuple | dict | range):
                self.spend(1 + len(value))

    def emit(self, value: Any) -> str:
        """`value` as a piece of output, of the template or of a macro or block inside it."""
        text = self.to_text(value)
        self._chars_left -= len(text)
        if self._chars_left < 0:
            raise Exceeded(f"the template writes more than {limits.TEMPLATE_OUTPUT_MAX_CHARS} characters")
        return text

    def to_text(self, value: Any) -> str:
        """`str(value)`, after a walk through nested containers: shared parts count as often as they would print."""
        stack = [value]
        while stack:
            item = stack.pop()
            self.touch(item)
            if isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                stack += item
        return str(value)

    def check_length(self, characters: int) -> None:
        """Counts a text of this length before it is made; raises Exceeded if it would be too long."""
        if characters > limits.TEMPLATE_OUTPUT_MAX_CHARS:
            raise Exceeded(f"the template makes a text of {characters} characters")
        self.spend(max(0, characters) // CHARS_PER_STEP)


METER: ContextVar[Meter] = ContextVar("meter")
"""The meter of the render that runs in this context."""


class Loop:
    """An iterable whose every turn is metered; it keeps its length, so `loop.length` and the like stay cheap."""

    def __init__(self, values: Iterable[Any], weight: int) -> None:
        self._values, self._weight = values, weight

    def __iter__(self) -> Iterator[Any]:
        meter = METER.get()
        for value in self._values:
            meter.spend(self._weight)
            yield value

    def __len__(self) -> int:
        if not isinstance(self._values, Sized):
            raise TypeError("a generator has no length")
        return len(self._values)


def join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """jinja2's filter `join`."""
    meter = METER.get()
    texts = [meter.to_text(value if attribute is None else value[attribute]) for value in values]
    meter.check_length(sum(map(len, texts)) + len(separator) * max(0, len(texts) - 1))
    return separator.join(texts)


def replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """jinja2's filter and Python's method `replace`."""
    text, limit = str(text), -1 if count is None else count
    found = text.count(old)
    METER.get().check_length(len(text) + (found if limit < 0 else min(limit, found)) * len(new))
    return str(text.replace(old, new, limit))


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja2's filter `indent`: lines after the first are indented, empty ones only if `blank`."""
    prefix = width if isinstance(width, str) else " " * width
    METER.get().check_length(len(text) + (1 + text.count("\n")) * (1 + len(prefix)))
    head, *rest = text.split("\n")
    return (prefix if first else "") + "\n".join([head, *(prefix + line if line or blank else line for line in rest)])


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers, which escapes no HTML; made in pieces, so that its growth is seen."""
    meter, length, pieces = METER.get(), 0, []
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    for piece in encoder.iterencode(value):
        meter.spend(_JSON_STEPS + len(piece) // CHARS_PER_STEP)
        length += len(piece)
        pieces.append(piece)
        if length > limits.TEMPLATE_OUTPUT_MAX_CHARS:
            raise Exceeded(f"the template makes JSON of more than {limits.TEMPLATE_OUTPUT_MAX_CHARS} characters")
    return "".join(pieces)
