"""The keys of a stage: the arguments and options of the command that it stands for, read from the command itself.

An option `--max-tokens` is the key `max_tokens`, an argument that help calls REF the key `ref`, FILE.tar `file`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from smeltkit.errors import BadConfig
from smeltkit.hints import meant
from smeltkit.strict_yaml import no_text

_HOW = ("plan", "wait", "json")
"""Options that say how a command goes about it, which is the recipe's affair."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one key takes."""

    kind: type
    """str, Path, int or float; of a list, the kind of its items."""
    is_list: bool
    default: Any
    """Value where the key is not given; None where it must be."""
    low: float | None
    high: float | None

    def read(self, value: Any, where: str) -> Any:
        """`value` if it is such a one, numbers also as text such as 1e-4; BadConfig."""
        if value is None:
            raise BadConfig(f"{where} {no_text(value)}")
        if self.is_list:
            if not isinstance(value, list) or not value:
                raise BadConfig(f"{where}={value!r} must be a list of one or more")
            return [self._one(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return self._one(value, where)

    def _one(self, value: Any, where: str) -> Any:
        if self.kind in (str, Path):
            if not isinstance(value, str) or not value:
                raise BadConfig(f"{where} {no_text(value)}")
            return value
        name = "a whole number" if self.kind is int else "a number"
        between = "" if self.low is None else f", {self.low:g} to {self.high:g}"
        try:
            found = None if isinstance(value, bool) else self.kind(str(value))
        except ValueError:
            found = None
        if found is None or (self.low is not None and not self.low <= found <= (self.high or found)):
            raise BadConfig(f"{where}={value!r} must be {name}{between}")
        return found


def options_of(command: Callable[..., None]) -> dict[str, Option]:
    """The keys that a stage of `command` may have, in the order of its help."""
    hints = typing.get_type_hints(command, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = typing.get_args(hints[name])
        is_list = typing.get_origin(kind) is list
        found[_key(info)] = Option(
            kind=typing.get_args(kind)[0] if is_list else kind,
            is_list=is_list,
            default=None if parameter.default is inspect.Parameter.empty else parameter.default,
            low=info.min,
            high=info.max,
        )
    return {key: option for key, option in found.items() if key not in _HOW}


def read_options(known: Mapping[str, Option], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The value of every key, given or by default; BadConfig for one that is unknown, missing or out of range."""
    for key in given:
        if key not in known:
            raise BadConfig(f"{where}.{key} is no key of such a stage; {meant(key, list(known), f'{where}.')}")
    found = {}
    for key, option in known.items():
        if key not in given and option.default is None:
            raise BadConfig(f"{where}.{key} is missing")
        found[key] = option.read(given[key], f"{where}.{key}") if key in given else option.default
    return found


def _key(info: OptionInfo | ArgumentInfo) -> str:
    if isinstance(info, ArgumentInfo):
        return str(info.metavar).partition(".")[0].lower()
    words = [str(word) for word in (info.default, *(info.param_decls or ()))]  # typer sorts the first out later
    long = next(word for word in words if word.startswith("--"))
    return long.partition("/")[0].removeprefix("--").replace("-", "_")
