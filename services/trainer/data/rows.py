"""Rows of a data file, one by one: JSONL, Parquet, CSV, TSV, or a whole text.

Parquet is told by its first bytes, whatever the file is called. It needs pyarrow, which is an extra of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from services.trainer.data.delimited import SEPARATORS, delimited_rows
from services.trainer.data.refusals import as_text, check_columns, listed, no_column, no_text
from services.trainer.settings.columns import ColumnSettings
from smeltkit import limits
from smeltkit.errors import BadDataset, NotBuilt

COLUMNS: Final = ("messages", "text", "ids")
"""What a row can hold; exactly one of them, and what stands beside it is not read."""
ANY: Final = ColumnSettings()
"""No column is named: a row holds one of COLUMNS."""
_PARQUET: Final = b"PAR1"
_BATCH_ROWS: Final = 256

Row = tuple[int, Mapping[str, Any]]
"""Number of a row, from 1, and what it holds."""


Wanted = Callable[[int], bool]
"""Number of a row to whether it is wanted."""


def rows_of(
    path: Path, *, form: str = "rows", columns: ColumnSettings = ANY, wanted: Wanted = lambda number: True
) -> Iterator[Row]:
    """The rows of a file of a `data_format`; BadDataset names the one that is wrong, NotBuilt says what Parquet needs.

    Where `columns` are named, rows are made of these alone. Rows that are not wanted are counted, and not looked into.
    """
    if form == "text":
        return iter([(1, {"text": _text(path)})] if wanted(1) else [])
    with path.open("rb") as file:
        is_parquet = file.read(len(_PARQUET)) == _PARQUET
    if form in SEPARATORS:
        if is_parquet:
            raise BadDataset(f"{path.name} is Parquet, not {form}; remove data_format")
        found: Iterator[Row] = delimited_rows(path, form, columns.names, wanted)
    else:
        found = _of_parquet(path, columns.names, wanted) if is_parquet else _of_lines(path, wanted)
    return _made_of(columns, found, path.name) if columns.names else found


def _made_of(columns: ColumnSettings, rows: Iterable[Row], name: str) -> Iterator[Row]:
    for number, row in rows:
        yield number, columns.row(row, partial(no_column, f"{name} row {number}", known=list(row)))


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(limits.DATASET_ROW_MAX_BYTES + 1)
    if len(data) > limits.DATASET_ROW_MAX_BYTES:
        raise BadDataset(
            f"{path.name} exceeds {limits.DATASET_ROW_MAX_BYTES} bytes, the most that one text may have; cut it into"
            ' rows of {"text": ...}'
        )
    if not data:
        raise BadDataset(f"{path.name} is empty")
    return as_text(data, path.name)


def _of_lines(path: Path, wanted: Wanted) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limits.DATASET_ROW_MAX_BYTES + 1):
            number += 1
            if len(line) > limits.DATASET_ROW_MAX_BYTES or number > limits.DATASET_ROWS_MAX:
                raise BadDataset(
                    f"{path.name} row {number} exceeds {limits.DATASET_ROW_MAX_BYTES} bytes, or the file"
                    f" {limits.DATASET_ROWS_MAX} rows"
                )
            if not wanted(number) or not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise no_text(f"{path.name} row {number}", error) from error
            except (ValueError, RecursionError) as error:
                raise BadDataset(
                    f"{path.name} row {number} is no JSON: {error}; for a plain text set data_format: text"
                ) from error
            if not isinstance(row, dict):
                raise BadDataset(f"{path.name} row {number} is no JSON object")
            yield number, row


def _of_parquet(path: Path, columns: tuple[str, ...], wanted: Wanted) -> Iterator[Row]:
    """Rows of the named columns, or of the one that a row can hold, a batch in memory at a time; no other is read."""
    if find_spec("pyarrow") is None:
        raise NotBuilt(
            f"{path.name} is Parquet, which needs pyarrow; install the extra: pip install 'smelt[parquet]', or give"
            " JSONL"
        )
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            check_columns(path.name, columns, known)
            found = columns or tuple(name for name in known if name in COLUMNS)
            if not columns and len(found) != 1:
                raise BadDataset(
                    f"{path.name} has the columns {listed(known)}; exactly one of {', '.join(COLUMNS)} is needed, or"
                    " columns, which name others"
                )
            if file.metadata.num_rows > limits.DATASET_ROWS_MAX:
                raise BadDataset(f"{path.name} has {file.metadata.num_rows} rows, at most {limits.DATASET_ROWS_MAX}")
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(found)):
                for place in range(batch.num_rows):
                    number += 1
                    if wanted(number):
                        yield number, {name: batch.column(name)[place].as_py() for name in found}
    except (arrow.ArrowException, OSError) as error:
        raise BadDataset(f"{path.name} is broken Parquet: {error}") from error
