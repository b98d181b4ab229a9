"""Strict reading of foreign records: every field is named, typed and bounded, and a field nobody reads is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from smeltkit.errors import BadSuite


class Fields:
    """One mapping of a file, read field by field; `close` refuses what was not read.

    Every failure is BadSuite with the place (file, and row where there is one), the field and what is wrong.
    """

    def __init__(self, place: str, value: Any) -> None:
        self.place = place
        if not isinstance(value, Mapping):
            raise BadSuite(f"{place}: must be a mapping of fields, not {_kind(value)}")
        self._values: dict[Any, Any] = dict(value)
        self._read: set[str] = set()

    def fail(self, field: str, problem: str) -> NoReturn:
        """Raises BadSuite about `field`."""
        raise BadSuite(f"{self.place}: field {field!r} {problem}")

    def peek(self, field: str) -> Any:
        """The field's value as it is, None if it is missing; it is not read by that."""
        return self._values.get(field)

    def take(self, field: str, kind: type) -> Any:
        """The field's value, which must be exactly of `kind`."""
        self._read.add(field)
        if field not in self._values:
            self.fail(field, "is missing")
        value = self._values[field]
        if type(value) is not kind:
            self.fail(field, f"must be {kind.__name__}, not {_kind(value)}")
        return value

    def text(self, field: str, *, can_be_empty: bool = False) -> str:
        """A string; empty only where allowed."""
        value: str = self.take(field, str)
        if not value and not can_be_empty:
            self.fail(field, "must not be empty")
        return value

    def integer(self, field: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value: int = self.take(field, int)
        if not low <= value <= high:
            self.fail(field, f"is {value}, must be {low} to {high}")
        return value

    def texts(self, field: str, *, can_be_empty: bool = False) -> tuple[str, ...]:
        """A list of non-empty strings."""
        values: list[Any] = self.take(field, list)
        if not values and not can_be_empty:
            self.fail(field, "must not be empty")
        for value in values:
            if not isinstance(value, str) or not value:
                self.fail(field, f"must hold non-empty strings, not {_kind(value)}")
        return tuple(values)

    def choice(self, field: str, allowed: tuple[str, ...]) -> str:
        """One of the `allowed` strings."""
        value = self.text(field)
        if value not in allowed:
            self.fail(field, f"is {value!r}, must be one of {', '.join(allowed)}")
        return value

    def section(self, field: str) -> Fields:
        """A nested mapping; close it too."""
        return Fields(f"{self.place}: {field}", self.take(field, dict))

    def close(self) -> None:
        """BadSuite if a field is left that nobody read."""
        unread = sorted(str(field) for field in set(self._values) - self._read)
        if unread:
            raise BadSuite(f"{self.place}: unknown field {unread[0]!r}; known: {', '.join(sorted(self._read))}")


def _kind(value: Any) -> str:
    return "empty text" if value == "" else type(value).__name__
