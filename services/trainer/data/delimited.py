"""Rows of CSV (RFC 4180) and TSV, one by one: UTF-8, a header in the first line, every row as long as that.

Quotes hold what contains a separator, a quote (doubled) or a line's end; a quote anywhere else is refused, since what
was meant is not certain. An empty line is passed over, as in JSONL.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from services.trainer.data.refusals import as_text, check_columns
from smeltkit import limits
from smeltkit.errors import BadDataset

SEPARATORS: Final = {"csv": ",", "tsv": "\t"}
"""Format to what stands between two columns."""


def delimited_rows(
    path: Path, form: str, columns: tuple[str, ...], wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Number, from 1, and the named columns of each row that is wanted; BadDataset tells row and line of a wrong one.

    Others are only counted.
    """
    csv.field_size_limit(limits.DATASET_ROW_MAX_BYTES)
    with path.open("rb") as file:
        lines = _Lines(file, SEPARATORS[form], path.name)
        reader = csv.reader(lines, delimiter=SEPARATORS[form], strict=True)
        number, line = 0, 1
        try:
            header = next((cells for cells in reader if cells), [])
            if not any(name.strip() for name in header):
                raise BadDataset(f"{path.name} holds no row, nor a header")
            check_columns(path.name, columns, header)
            lines.is_header = False
            line = reader.line_num + 1
            for number, cells in enumerate(reader, start=1):
                if number > limits.DATASET_ROWS_MAX:
                    raise BadDataset(f"{path.name} has more than {limits.DATASET_ROWS_MAX} rows")
                if wanted(number) and cells:
                    where = f"{path.name} row {number} (line {line})"
                    yield number, _row(where, header, cells, columns)
                line, lines.size_bytes = reader.line_num + 1, 0
        except (csv.Error, OverflowError) as error:
            if wanted(number + 1) or not number:
                raise BadDataset(f"{path.name} row {number + 1} (line {line}): {error}; mend its quotes") from error


class _Lines:
    """The lines of a file, bytes that are no UTF-8 as surrogates, but in the header refused; OverflowError for a row
    beyond its bound, csv.Error for what `csv` takes for text or does not name."""

    def __init__(self, file: BinaryIO, separator: str, name: str) -> None:
        self._file, self._separator, self._name = file, separator, name
        self.size_bytes, self.is_header, self._is_first, self._is_quoted = 0, True, True, False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(limits.DATASET_ROW_MAX_BYTES + 1)
        self.size_bytes += len(line)
        if not line:
            if self._is_quoted:
                raise csv.Error("a quote is never closed")
            raise StopIteration
        if self.size_bytes > limits.DATASET_ROW_MAX_BYTES:
            raise OverflowError(f"it exceeds {limits.DATASET_ROW_MAX_BYTES} bytes, or a quote is never closed")
        if self.is_header:
            as_text(line, f"{self._name}, its header,")
        text = line.decode(errors="surrogateescape")
        text, self._is_first = text.removeprefix("\ufeff") if self._is_first else text, False
        self._check_quotes(text)
        return text

    def _check_quotes(self, line: str) -> None:
        """Every other part between quotes lies outside of them; what is there before a quote ends a cell."""
        parts = line.split('"')
        if any("\r" in outside.rstrip("\r\n") for outside in parts[self._is_quoted :: 2]):
            raise csv.Error("a carriage return stands within a line")
        for outside in parts[self._is_quoted : -1 : 2]:
            if outside and not outside.endswith(self._separator):
                raise csv.Error(
                    f"a quote stands after {outside[-20:]!r}, within a cell, which must be quoted as a whole"
                )
        self._is_quoted ^= len(parts) % 2 == 0


def _row(where: str, header: list[str], cells: list[str], columns: tuple[str, ...]) -> dict[str, str]:
    if len(cells) != len(header):
        raise BadDataset(
            f"{where} has {len(cells)} columns, the header {len(header)}; quote what contains a separator or a line's"
            " end"
        )
    found = {name: cells[header.index(name)] for name in columns}
    for name, value in found.items():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadDataset(f"{where}: {name} is no UTF-8 text; store the file as UTF-8") from error
    return found
