"""Python values as tagged JSON, so that only exact builtin values can come out of the decoder.

Scalars cross as themselves, everything else as `[tag, ...]`. Mutable containers and tuples carry an index: sharing and
cycles survive, and a later frame can name the same object by `["r", index]`. A subclass of a builtin crosses as its
base content, read by the base class's own methods. What is none of this is `opaque`: a reference that the side makes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import isfinite
from typing import Any, Final

DEPTH_MAX: Final = 200
_PLAIN: Final = frozenset((type(None), bool, float))
_SMALL: Final = 1 << 53
_INT_ONLY, _FLOAT_ONLY, _STR_ONLY = {int}, {float}, {str}

Opaque = Callable[[object], list[Any]]


def is_plain(value: object) -> bool:
    """Whether `value` crosses as itself, and no encoder need be made for it."""
    kind = type(value)
    if kind is int:
        return -_SMALL <= value <= _SMALL  # type: ignore[operator]
    return kind in _PLAIN or (kind is str and value.isascii())  # type: ignore[attr-defined]


class CannotCross(Exception):
    """The value is nested too deeply, or a tuple contains itself."""


class Encoder:
    """Encodes one frame's values. `known` maps id to index for objects that the other side has already; `kept` holds
    every indexed object, by index, so that no id is reused while the frame lives."""

    def __init__(self, opaque: Opaque, known: Iterable[tuple[int, object]] = ()) -> None:
        self._opaque = opaque
        self.kept: dict[int, object] = dict(known)
        self._indices = {id(value): index for index, value in self.kept.items()} if self.kept else {}
        self._next = max(self.kept) + 1 if self.kept else 0
        self._forced = -1
        self._depth = 0

    def encode(self, value: object) -> Any:
        """`value` as JSON; CannotCross."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        writer = _WRITERS.get(kind)
        if writer is None:
            base = _base_of(kind, value)
            writer = _WRITERS.get(base) if base else None
            if writer is None:
                return self._opaque(value)
        return writer(self, value)

    def content(self, value: object) -> Any:
        """The present content of a container that has an index already, as if it had none."""
        self._forced = self._indices.pop(id(value))
        return self.encode(value)

    def _write_int(self, value: int) -> Any:
        exact = int.__pos__(value)
        return exact if -_SMALL <= exact <= _SMALL else ["i", hex(exact)]

    def _write_float(self, value: float) -> Any:
        return float.__pos__(value)

    def _write_str(self, value: str) -> Any:
        exact = str.__str__(value)
        if exact.isascii():
            return exact
        try:
            exact.encode()
        except UnicodeEncodeError:
            return ["s", exact.encode("utf-8", "surrogatepass").hex()]
        return exact

    def _write_list(self, value: list[Any]) -> Any:
        exact = value if type(value) is list else list(list.__iter__(value))
        kinds = set(map(type, exact))
        is_flat = (
            (kinds == _INT_ONLY and max(max(exact), -min(exact)) <= _SMALL)
            or (kinds == _FLOAT_ONLY and all(map(isfinite, exact)))
            or (kinds == _STR_ONLY and "".join(exact).isascii())
        )
        if is_flat and id(value) not in self._indices:
            return ["l", self._index(value), *exact]
        return self._write_items("l", value, exact)

    def _write_items(self, tag: str, value: object, items: Iterable[object], *extra: Any) -> Any:
        if id(value) in self._indices:
            return ["r", self._indices[id(value)]]
        index = self._index(value)
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise CannotCross(f"value is nested more than {DEPTH_MAX} levels deep")
        try:
            return [tag, index, *extra, *[self.encode(item) for item in items]]
        finally:
            self._depth -= 1

    def _write_tuple(self, value: tuple[Any, ...]) -> Any:
        fields = getattr(type(value), "_fields", None) if type(value) is not tuple else None
        items = tuple.__iter__(value)
        if type(fields) is tuple and len(fields) == tuple.__len__(value) and all(type(f) is str for f in fields):
            return self._write_items("n", value, items, list(fields))
        return self._write_items("t", value, items)

    def _write_dict(self, value: dict[Any, Any]) -> Any:
        flat = (part for pair in dict.items(value) for part in pair)
        return self._write_items("d", value, flat)

    def _write_deque(self, value: collections.deque[Any]) -> Any:
        bound = collections.deque.maxlen.__get__(value)
        return self._write_items("q", value, collections.deque.__iter__(value), bound)

    def _write_bytearray(self, value: bytearray) -> Any:
        if id(value) in self._indices:
            return ["r", self._indices[id(value)]]
        return ["ba", self._index(value), bytes(value).hex()]

    def _write_datetime(self, value: datetime) -> Any:
        zone = value.tzinfo
        if zone is not None and type(zone) is not timezone:
            return self._opaque(value)
        offset = None if zone is None else value.utcoffset()
        parts = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
        return ["dt", *parts, value.fold, None if offset is None else offset / timedelta(microseconds=1)]

    def _index(self, value: object) -> int:
        index, self._forced = self._forced, -1
        if index < 0:
            index, self._next = self._next, self._next + 1
        self.kept[index] = value
        self._indices[id(value)] = index
        return index


_WRITERS: Final[Mapping[Any, Callable[[Encoder, Any], Any]]] = {
    type(None): lambda encoder, value: None,
    bool: lambda encoder, value: value,
    int: Encoder._write_int,
    float: Encoder._write_float,
    str: Encoder._write_str,
    list: Encoder._write_list,
    tuple: Encoder._write_tuple,
    dict: Encoder._write_dict,
    set: lambda encoder, value: encoder._write_items("e", value, set.__iter__(value)),
    frozenset: lambda encoder, value: encoder._write_items("fe", value, frozenset.__iter__(value)),
    collections.deque: Encoder._write_deque,
    bytearray: Encoder._write_bytearray,
    complex: lambda encoder, value: ["c", complex.__pos__(value).real, complex.__pos__(value).imag],
    bytes: lambda encoder, value: ["b", bytes.hex(value)],
    range: lambda encoder, value: ["rg", *map(encoder._write_int, (value.start, value.stop, value.step))],
    slice: lambda encoder, value: ["sl", *map(encoder.encode, (value.start, value.stop, value.step))],
    type({}.keys()): lambda encoder, value: encoder._write_items("dk", value, value),
    type({}.values()): lambda encoder, value: encoder._write_items("dv", value, value),
    type({}.items()): lambda encoder, value: encoder._write_items("di", value, value),
    Decimal: lambda encoder, value: ["D", Decimal.__str__(value)],
    Fraction: lambda encoder, value: ["F", hex(value.numerator), hex(value.denominator)],
    datetime: Encoder._write_datetime,
    date: lambda encoder, value: ["da", value.year, value.month, value.day],
    time: lambda encoder, value: ["tm", value.hour, value.minute, value.second, value.microsecond],
    timedelta: lambda encoder, value: ["td", value.days, value.seconds, value.microseconds],
    type(Ellipsis): lambda encoder, value: ["el"],
    type(NotImplemented): lambda encoder, value: ["ni"],
}


def _base_of(kind: type, value: object) -> type | None:
    """The builtin class whose content `value` carries, if its class derives from one."""
    for base in type.mro(kind):
        if base in _WRITERS:
            return None if base is time and getattr(value, "tzinfo", None) else base
    return None
