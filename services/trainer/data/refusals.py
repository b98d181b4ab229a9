"""What every kind of data file is refused for, in the same words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from smeltkit.errors import BadDataset


def no_column(what: str, name: str, known: Sequence[str]) -> BadDataset:
    """A file or row, `what`, lacks a column that is named, and has those that are known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return BadDataset(f"{what} has no column {name!r}; it has {listed(known)}{hint}")


def check_columns(what: str, columns: Iterable[str], known: Sequence[str]) -> None:
    """BadDataset unless a file has each of the columns exactly once."""
    for name in columns:
        if name not in known:
            raise no_column(what, name, known)
        if known.count(name) > 1:
            raise BadDataset(f"{what} has the column {name!r} {known.count(name)} times; which is meant is not certain")


def listed(names: Sequence[str]) -> str:
    """The first of the names of a user's columns, whatever they are written with."""
    return ", ".join(names[:8]).encode(errors="backslashreplace").decode() or "none"


def as_text(data: bytes, what: str) -> str:
    """UTF-8 text; BadDataset names the first byte that is none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise no_text(what, error) from error


def no_text(what: str, error: UnicodeDecodeError) -> BadDataset:
    """A file or row, `what`, is no text."""
    byte = error.object[error.start]
    return BadDataset(f"{what} is no UTF-8 text: byte 0x{byte:02x} at {error.start}; store the file as UTF-8")
