"""Settings from plain values: each key known or refused with the nearest one that is, numbers as people write them."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from smeltkit.errors import BadConfig
from smeltkit.hints import meant

T = TypeVar("T")
WRITTEN: Final = "written"
"""Of a field that people write under another key, its metadata's name of that key."""
_NUMBER: Final = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)([KMG]?)", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def read_settings(kind: type[T], value: Any, where: str = "", beside: Sequence[str] = ()) -> T:
    """A settings class from plain values; numbers may be written 32K, 1e-4 or 1_000.

    `beside` are the keys that people write among them and that are read elsewhere: hints name them as well.
    """
    if not isinstance(value, Mapping):
        raise BadConfig(f"{where.rstrip('.') or 'settings'} must be a mapping of keys, not {value!r}")
    types_of = typing.get_type_hints(kind)
    known = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            if key in beside:
                raise BadConfig(f"{key} is no setting of one training; it stands beside its settings")
            own = [entry.metadata.get(WRITTEN, entry.name) for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
            raise BadConfig(f"{where}{key} is no setting; {meant(key, list(dict.fromkeys([*beside, *own])), where)}")
    return kind(**{key: _read(types_of[key], item, where + key) for key, item in value.items()})


def _read(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):  # of a class and None, which stands for what is not given
        return None if value is None else _read(typing.get_args(kind)[0], value, where)
    if dataclasses.is_dataclass(kind):
        return read_settings(kind, value, f"{where}.")  # type: ignore[arg-type]
    if isinstance(kind, types.GenericAlias):
        of = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(of):
            if not isinstance(value, list):
                raise BadConfig(f"{where}={value!r} must be a list")
            return tuple(read_settings(of, item, f"{where}[{number}].") for number, item in enumerate(value))  # type: ignore[arg-type]
        if of is float and isinstance(value, list):
            return tuple(_number(float, item, f"{where}[{number}]") for number, item in enumerate(value))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise BadConfig(f"{where}={value!r} must be a list of {'numbers' if of is float else 'names'}")
        return tuple(value)
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise BadConfig(f"{where}={value!r} must be {'true or false' if kind is bool else 'text'}")
        return value
    return _number(kind, value, where)


def _number(kind: type[int] | type[float], value: Any, where: str) -> int | float:
    """A number, also of a text such as 32K (1,024 each) or 1e-4; a whole one where `kind` is int."""
    found: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        found = float(match[1].replace("_", "")) * _UNITS[match[2].upper()]
    if found is None or not math.isfinite(found) or (kind is int and found != int(found)):
        raise BadConfig(f"{where}={value!r} must be a {'whole ' if kind is int else ''}number such as 32K or 1e-4")
    return kind(found)
