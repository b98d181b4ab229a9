"""Tagged JSON back into Python values: nothing but exact builtin values and the side's own references come out.

The other half of `encode`; it is what stands between a hostile candidate and the judge.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from services.sandbox.wire.encode import DEPTH_MAX, CannotCross

FIELDS_MAX: Final = 256
JSON_SCALARS: Final = frozenset((int, float, str, bool, type(None)))
"""What a frame's JSON holds as itself."""

Resolve = Callable[[list[Any]], object]


class MalformedValue(Exception):
    """A tag, index or payload that no honest encoder produces."""


class Decoder:
    """Decodes one frame's values; `known` are objects by index that the frame may name. MalformedValue otherwise."""

    def __init__(self, resolve: Resolve, known: Mapping[int, object] | None = None) -> None:
        self._resolve = resolve
        self.kept: dict[int, object] = dict(known or {})
        self._depth = 0

    def decode(self, data: Any) -> Any:
        """The value behind `data`."""
        if type(data) is not list:
            if type(data) is dict:
                raise MalformedValue("bare object")
            return data
        if not data or type(data[0]) is not str:
            raise MalformedValue("container without a tag")
        reader = _READERS.get(data[0])
        if reader is None:
            return self._resolve(data)
        self._depth += 1
        if self._depth > 2 * DEPTH_MAX:
            raise MalformedValue("nested too deeply")
        try:
            return reader(self, data)
        except (TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
            raise MalformedValue(f"bad payload of {data[0]}") from error
        finally:
            self._depth -= 1

    def items(self, data: list[Any], start: int) -> list[Any]:
        """The decoded items of `data` from `start` on."""
        rest = data[start:]
        if set(map(type, rest)) <= JSON_SCALARS:
            return rest
        return [self.decode(item) for item in rest]

    def keep(self, data: list[Any], value: Any) -> Any:
        """Registers `value` under the index that `data` gives it."""
        index = data[1]
        if type(index) is not int or index in self.kept:
            raise MalformedValue("bad index")
        self.kept[index] = value
        return value

    def read_reference(self, data: list[Any]) -> Any:
        """The object that `data` names by its index."""
        if data[1] not in self.kept:
            raise MalformedValue("unknown index")
        return self.kept[data[1]]

    def _read_list(self, data: list[Any]) -> Any:
        found: list[Any] = self.keep(data, [])
        found += self.items(data, 2)
        return found

    def _read_dict(self, data: list[Any]) -> Any:
        found: dict[Any, Any] = self.keep(data, {})
        flat = self.items(data, 2)
        if len(flat) % 2:
            raise MalformedValue("key without value")
        _hashing(found.update, zip(flat[::2], flat[1::2], strict=True))
        return found

    def _read_set(self, data: list[Any]) -> Any:
        found: set[Any] = self.keep(data, set())
        _hashing(found.update, self.items(data, 2))
        return found

    def _read_deque(self, data: list[Any]) -> Any:
        found: collections.deque[Any] = self.keep(data, collections.deque(maxlen=data[2]))
        found.extend(self.items(data, 3))
        return found

    def _read_named_tuple(self, data: list[Any]) -> Any:
        items = self.items(data, 3)
        return self.keep(data, _named_tuple(tuple(data[2]))(items))

    def _read_item_view(self, data: list[Any]) -> Any:
        pairs = self.items(data, 2)
        if not all(type(pair) is tuple and len(pair) == 2 for pair in pairs):
            raise MalformedValue("bad item view")
        return self.keep(data, dict(pairs).items())

    def _read_datetime(self, data: list[Any]) -> Any:
        offset = data[9]
        zone = None if offset is None else timezone(timedelta(microseconds=offset))
        return datetime(*data[1:8]).replace(tzinfo=zone, fold=data[8])


def _named_tuple(fields: tuple[str, ...]) -> Any:
    """A tuple class with `fields` as attributes; it compares as a tuple."""
    known = _NAMED_TUPLES.get(fields)
    if known is None:
        if len(fields) > FIELDS_MAX or not all(type(f) is str and f.isidentifier() and f[0] != "_" for f in fields):
            raise MalformedValue("bad field names")
        make: Any = collections.namedtuple
        known = make("NamedTuple", fields)._make
        if len(_NAMED_TUPLES) < FIELDS_MAX:
            _NAMED_TUPLES[fields] = known
    return known


_NAMED_TUPLES: Final[dict[tuple[str, ...], Any]] = {}


def _hashing(collect: Callable[[Any], Any], items: Iterable[Any]) -> Any:
    """A key's base content may be unhashable although the candidate's subclass was not."""
    try:
        return collect(items)
    except TypeError as error:
        raise CannotCross("an unhashable key") from error


def replace_content(decoder: Decoder, data: Any) -> None:
    """Gives the container that `decoder` knows under `data`'s index the content of `data`, in place."""
    if type(data) is not list or len(data) < 2 or data[0] not in _REPLACERS:
        raise MalformedValue("change of something immutable")
    kind, replace = _REPLACERS[data[0]]
    original = decoder.read_reference(data)
    if not isinstance(original, kind):
        raise MalformedValue("change of another kind of container")
    replace(decoder, original, data)


def _replace_list(decoder: Decoder, original: list[Any], data: list[Any]) -> None:
    list.__setitem__(original, slice(None), decoder.items(data, 2))


def _replace_dict(decoder: Decoder, original: dict[Any, Any], data: list[Any]) -> None:
    flat = decoder.items(data, 2)
    dict.clear(original)
    _hashing(lambda pairs: dict.update(original, pairs), zip(flat[::2], flat[1::2], strict=False))


def _replace_set(decoder: Decoder, original: set[Any], data: list[Any]) -> None:
    items = decoder.items(data, 2)
    set.clear(original)
    _hashing(lambda found: set.update(original, found), items)


def _replace_deque(decoder: Decoder, original: collections.deque[Any], data: list[Any]) -> None:
    items = decoder.items(data, 3)
    original.clear()
    original.extend(items)


def _replace_bytearray(decoder: Decoder, original: bytearray, data: list[Any]) -> None:
    if type(data[2]) is not str:
        raise MalformedValue("bad payload of ba")
    original[:] = bytes.fromhex(data[2])


_REPLACERS: Final[Mapping[str, tuple[type, Callable[[Decoder, Any, list[Any]], None]]]] = {
    "l": (list, _replace_list),
    "d": (dict, _replace_dict),
    "e": (set, _replace_set),
    "q": (collections.deque, _replace_deque),
    "ba": (bytearray, _replace_bytearray),
}


_READERS: Final[Mapping[str, Callable[[Decoder, list[Any]], Any]]] = {
    "r": Decoder.read_reference,
    "i": lambda decoder, data: int(data[1], 16),
    "s": lambda decoder, data: bytes.fromhex(data[1]).decode("utf-8", "surrogatepass"),
    "l": Decoder._read_list,
    "t": lambda decoder, data: decoder.keep(data, tuple(decoder.items(data, 2))),
    "n": Decoder._read_named_tuple,
    "d": Decoder._read_dict,
    "e": Decoder._read_set,
    "fe": lambda decoder, data: decoder.keep(data, frozenset(decoder.items(data, 2))),
    "q": Decoder._read_deque,
    "ba": lambda decoder, data: decoder.keep(data, bytearray.fromhex(data[2])),
    "b": lambda decoder, data: bytes.fromhex(data[1]),
    "c": lambda decoder, data: complex(data[1], data[2]),
    "rg": lambda decoder, data: range(*(decoder.decode(part) for part in data[1:4])),
    "sl": lambda decoder, data: slice(*(decoder.decode(part) for part in data[1:4])),
    "dk": lambda decoder, data: decoder.keep(data, dict.fromkeys(decoder.items(data, 2)).keys()),
    "dv": lambda decoder, data: decoder.keep(data, dict(enumerate(decoder.items(data, 2))).values()),
    "di": Decoder._read_item_view,
    "D": lambda decoder, data: Decimal(data[1]),
    "F": lambda decoder, data: Fraction(int(data[1], 16), int(data[2], 16)),
    "dt": Decoder._read_datetime,
    "da": lambda decoder, data: date(*data[1:4]),
    "tm": lambda decoder, data: time(*data[1:5]),
    "td": lambda decoder, data: timedelta(*data[1:4]),
    "el": lambda decoder, data: Ellipsis,
    "ni": lambda decoder, data: NotImplemented,
}

KNOWN_TAGS: Final = frozenset(_READERS)
"""Tags of values; others are references of a side."""
