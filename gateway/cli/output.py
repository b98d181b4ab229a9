"""What a person or a script sees: results on standard output, everything else on standard error.

With `--json` exactly one document goes out, also when the command fails: then it is {"error": {...}}.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from smeltkit.errors import BadRequest, SmeltError

_PIPED_WIDTH = 200
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


class Output:
    """Standard output and error of one command. Colour only on a terminal, never with NO_COLOR."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = _console(is_error=False)
        self.err = _console(is_error=True)

    def show(self, document: Any, *views: RenderableType) -> None:
        """Prints the result: `document` with `--json`, else `views` one after the other."""
        if self.as_json:
            print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
            return
        with self.out.capture() as captured:
            for view in views:
                self.out.print(view)
        for line in captured.get().splitlines():
            print(line.rstrip())

    def note(self, text: str) -> None:
        """One line about what is going on."""
        self.err.print(Text(text, style="dim"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line about what somebody should look at."""
        self.err.print(Text.assemble(("alert: ", "bold yellow"), text), soft_wrap=True)

    def error(self, error: SmeltError) -> None:
        """The reason, then the message with its remedy."""
        if self.as_json:
            self.show({"error": {"reason": error.reason(), "message": error.message, "details": error.details}})
        self.err.print(Text.assemble(("error: ", "bold red"), (error.reason(), "bold")))
        self.err.print(Text(f"  {error.message}"), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """A table; columns whose name starts with '>' are aligned right. Values too long are folded, never cut."""
    view = Table(box=None, title=title or None, title_justify="left", header_style="bold", pad_edge=False)
    for column in columns:
        view.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        view.add_row(*(Text(str(value)) for value in row))
    return view


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and values in two columns; empty values are left out."""
    view = Table(box=None, show_header=False, pad_edge=False)
    view.add_column(style="bold")
    view.add_column(overflow="fold")
    for name, value in pairs:
        if value not in ("", None):
            view.add_row(name, Text(str(value)))
    return view


def human_bytes(size_bytes: float) -> str:
    """12.3 MiB."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(size_bytes, 1024)), len(units))
    return f"{size_bytes / 1024**power:.1f} {units[power - 1]}"


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size such as 40GiB, 40G, 512M or 1024; BadRequest names the option that it was given to."""
    found = _SIZE.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise BadRequest(f"{option} {text!r} is no size; write a number above 0 with K, M, G or T, such as 40GiB")
    return int(float(found[1]) * 1024.0 ** " KMGT".index(found[2].upper() or " "))


def human_time(time_s: float) -> str:
    """850 ms, 12.3 s or 4 min 05 s."""
    if time_s < 1:
        return f"{time_s * 1000:.0f} ms" if time_s >= 0.01 else f"{time_s * 1000:.1f} ms"
    return f"{time_s:.1f} s" if time_s < 120 else f"{int(time_s) // 60} min {int(time_s) % 60:02d} s"


def measured(value: object) -> object:
    """A value as a table shows it: what was not measured is a dash, never 0."""
    return "-" if value is None or value == "" else value


def short_digest(digest: str) -> str:
    """The first 12 hex digits: enough to recognise and to ask with."""
    return digest.removeprefix("sha256:")[:12]


def _console(*, is_error: bool) -> Console:
    stream = sys.stderr if is_error else sys.stdout
    width = None if stream.isatty() else _PIPED_WIDTH
    return Console(stderr=is_error, highlight=False, markup=False, emoji=False, width=width)
