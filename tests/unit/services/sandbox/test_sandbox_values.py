"""How values cross: exact types back, base content of subclasses, sharing, changes, and nothing else from outside."""

from __future__ import annotations

import collections
import json
import math
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.sandbox.wire.decode import Decoder, MalformedValue, replace_content
from services.sandbox.wire.encode import DEPTH_MAX, CannotCross, Encoder

EXACT = frozenset(
    (type(None), bool, int, float, str, bytes, list, tuple, dict, set, frozenset, bytearray, complex, range, slice)
) | frozenset((collections.deque, Decimal, Fraction, date, datetime, time, timedelta, type(...), type(NotImplemented)))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner) | st.frozensets(inner, max_size=1), max_leaves=3)
VALUES = st.recursive(
    SCALARS | st.dates() | st.timedeltas() | st.fractions() | st.decimals(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(HASHABLE, inner, max_size=4),
    max_leaves=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=25,
)
TAGS = st.sampled_from(
    ["r", "i", "s", "l", "t", "n", "d", "e", "fe", "q", "ba", "b", "c", "rg", "sl", "dk", "dv", "di"]
)


def crossed(value: object) -> Any:
    """`value` after it went over the wire."""
    text = json.dumps(Encoder(lambda other: ["h", 1]).encode(value))
    return Decoder(lambda data: "a handle").decode(json.loads(text))


@pytest.mark.parametrize(
    "value",
    [
        2**53 + 1,
        -(2**70),
        10**6000,
        -0.0,
        math.inf,
        "\ud800",
        "\ud83d\ude00",
        "\x00",
        bytearray(b"ab"),
        {(1, (2, 3)): [{4}]},
        frozenset({1}),
        collections.deque([1, 2], maxlen=3),
        range(5, 1, -2),
        slice(1, None, [2]),
        ...,
        NotImplemented,
        Decimal("-0.10"),
        Fraction(-1, 3),
        datetime(2020, 2, 29, 1, 2, 3, 4, tzinfo=UTC),
        datetime(2020, 2, 29, tzinfo=timezone(timedelta(hours=-3))),
        time(1, 2, 3, 4),
        timedelta(days=-1, microseconds=5),
        1 + 2j,
        {1: 2}.keys(),
        {1: 2}.items(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_crosses_with_its_exact_type(value: object) -> None:
    found = crossed(value)
    assert (found, type(found)) == (value, type(value))


@given(VALUES)
@settings(max_examples=60)
def test_any_plain_value_crosses(value: object) -> None:
    assert repr(crossed(value)) == repr(value)


def test_subclass_crosses_as_the_content_of_its_base() -> None:
    """R-083: overridden equality, iteration and items have no effect."""

    class Lying(list[int]):
        def __iter__(self) -> Any:
            return iter([7])

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class LyingDict(dict[str, int]):
        def items(self) -> Any:
            return [("a", 7)]

    class Color(IntEnum):
        RED = 3

    found = crossed([Lying([1, 2]), LyingDict(b=1), Color.RED, collections.Counter("aab")])
    assert found == [[1, 2], {"b": 1}, 3, {"a": 2, "b": 1}]
    assert [type(item) for item in found] == [list, dict, int, dict]


def test_named_tuple_keeps_its_fields_and_compares_as_a_tuple() -> None:
    point = collections.namedtuple("point", "x y")
    found = crossed(point(1, 2))
    assert (found.x, found.y, found) == (1, 2, (1, 2))


def test_sharing_and_cycles_survive() -> None:
    inner: list[Any] = [1]
    outer = [inner, inner]
    outer.append(outer)
    found = crossed(outer)
    assert found[0] is found[1] and found[2] is found


def test_doubling_structure_stays_small() -> None:
    value: tuple[Any, ...] = ()
    for _ in range(100):
        value = (value, value)
    assert len(json.dumps(Encoder(lambda other: []).encode(value))) < 10_000


def test_too_deep_a_value_cannot_cross() -> None:
    value: list[Any] = []
    for _ in range(DEPTH_MAX + 1):
        value = [value]
    with pytest.raises(CannotCross):
        crossed(value)


def test_changed_arguments_come_back_in_place() -> None:
    inner: list[Any] = [2]
    argument: list[Any] = [1, inner, {"a": 1}, {5}]
    sent = Encoder(lambda other: [])
    guest = Decoder(lambda data: None)
    theirs = guest.decode(sent.encode(argument))
    theirs[1].append(theirs)
    theirs[2]["b"] = theirs[1]
    theirs[3].clear()
    reply = Encoder(lambda other: [], guest.kept.items())
    value, changes = reply.encode(theirs), [reply.content(item) for item in guest.kept.values()]
    ours = Decoder(lambda data: None, sent.kept)
    assert ours.decode(value) is argument
    for change in changes:
        replace_content(ours, change)
    assert argument[1] is inner and inner == [2, argument] and argument[2] == {"a": 1, "b": inner}
    assert argument[3] == set()


@given(JSON | st.tuples(TAGS, JSON, JSON).map(list) | st.lists(JSON).map(lambda rest: ["l", 0, *rest]))
@settings(max_examples=200)
def test_only_exact_builtin_values_come_out_of_the_decoder(data: object) -> None:
    """R-082: whatever a candidate sends is refused or is a plain value."""
    try:
        found = Decoder(lambda reference: None).decode(json.loads(json.dumps(data)))
    except (MalformedValue, CannotCross):
        return
    view_kinds = tuple(type(view) for view in ({}.keys(), {}.values(), {}.items()))
    assert type(found) in EXACT or isinstance(found, (*view_kinds, tuple))


@pytest.mark.parametrize(
    "data",
    [{}, [], [1], ["r", 0], ["r", []], ["l"], ["l", "x"], ["d", 0, 1], ["i", "zz"], ["n", 0, ["__eq__"], 1], ["b", 3]],
    ids=str,
)
def test_malformed_value_is_refused(data: object) -> None:
    with pytest.raises(MalformedValue):
        Decoder(lambda reference: None).decode(data)


@pytest.mark.parametrize("change", [["t", 0, 1], ["d", 0, 1, 2], ["l", 9, 1], 5, ["l"]], ids=str)
def test_malformed_change_is_refused(change: object) -> None:
    """A change may only give a known mutable container new content of its own kind."""
    with pytest.raises((MalformedValue, IndexError)):
        replace_content(Decoder(lambda reference: None, {0: [1]}), change)
