"""CSV and TSV as training data, and columns of any kind of file: the samples of the equal JSONL, or named refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from gateway.cli.training_file import form_of
from services.trainer.data.rows import rows_of
from services.trainer.settings.columns import ColumnSettings
from services.trainer.settings.training import parse_settings
from smeltkit.errors import BadConfig, BadDataset, UnsupportedOption

PAIRS = [
    ("What is 1, 2?", 'It is "3".\nYes.'), ("Plain", "Answer"), ("Umlaut \u00e4\u2713", "tab\there"), ("a", " spaced "),
]  # fmt: skip
CHAT = ColumnSettings(prompt="question", response="answer")
TEXT = ColumnSettings(text="answer")


def _write(path: Path, rows: Sequence[Sequence[str]], separator: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


def _table(path: Path, separator: str = ",") -> Path:
    return _write(path, [("id", "question", "answer"), *((str(n), *pair) for n, pair in enumerate(PAIRS))], separator)


def _asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(("form", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_holds_the_rows_that_jsonl_holds(tmp_path: Path, form: str, separator: str) -> None:
    """Row by row, with quotes, lines' ends within cells and any script; other columns are not read."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(_asked(*pair)) + "\n" for pair in PAIRS))
    table = _table(tmp_path / "table", separator)
    assert list(rows_of(table, form=form, columns=CHAT)) == list(rows_of(lines))
    assert [row for _, row in rows_of(table, form=form, columns=TEXT)] == [{"text": answer} for _, answer in PAIRS]
    odd = [number for number, _ in rows_of(table, form=form, columns=TEXT, wanted=lambda number: number % 2 == 1)]
    assert odd == [1, 3]
    marked = tmp_path / "marked"
    marked.write_bytes(b"\xef\xbb\xbf" + table.read_bytes() + b"\r\n")
    assert list(rows_of(marked, form=form, columns=CHAT)) == list(rows_of(lines)), "byte order mark, empty last line"


def test_columns_are_read_from_jsonl_and_parquet_too(tmp_path: Path) -> None:
    """Named ones and no others; a system text stands before the prompt where there is one."""
    found = [{"q": "one", "a": "two", "s": "be kind", "n": 1}, {"q": "three", "a": "four", "s": "", "n": 2}]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in found))
    parquet.write_table(pyarrow.table({key: [row[key] for row in found] for key in "qasn"}), table)
    columns = ColumnSettings(prompt="q", response="a", system="s")
    rows = [row for _, row in rows_of(lines, columns=columns)]
    assert rows == [row for _, row in rows_of(table, columns=columns)]
    assert [len(row["messages"]) for row in rows] == [3, 2] and rows[1] == _asked("three", "four")
    assert [row for _, row in rows_of(table, columns=ColumnSettings(text="q"))] == [{"text": "one"}, {"text": "three"}]
    with pytest.raises(BadDataset, match=r"rows.parquet has no column 'code'; it has q, a, s, n$"):
        list(rows_of(table, columns=ColumnSettings(text="code")))
    with pytest.raises(BadDataset, match=r"rows.jsonl row 1 has no column 'code'; it has q, a, s, n$"):
        list(rows_of(lines, columns=ColumnSettings(text="code")))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a,answer\n1,x\n2\n", r"row 2 \(line 3\) has 1 columns, the header 2"),
        (b'a,answer\n1,"x\ny"\n2,z,3\n', r"row 2 \(line 4\) has 3 columns"),
        (b"a,answer\n1,x\n2,\xff\xfe\n", r"row 2 \(line 3\): answer is no UTF-8"),
        (b'a,answer\n1,x\n2,"open\n', r"row 2 \(line 3\): a quote is never closed; mend its quotes"),
        (b'a,answer\n1,"x"y\n', r"row 1 \(line 2\): '[,]' expected after"),
        (b'a,answer\n1,"x\n""y"\n2,z"z\n', r"row 2 \(line 4\): a quote stands after '2,z', within a cell"),
        (b'a,answer\nc"d,e\n', r"row 1 \(line 2\): a quote stands after 'c'"),
        (b"a,b\n1,2\n", r"no column 'answer'; it has a, b$"),
        (b"a,anser\n1,2\n", r"no column 'answer'; it has a, anser; did you mean 'anser'\?"),
        (b"answer,answer\n1,2\n", r"the column 'answer' 2 times"),
        (b"", "table.csv holds no row"),
        (b" \n\n", "table.csv holds no row"),
        (b"PK\x03\x04\x8b,answer\n", "its header, is no UTF-8 text: byte 0x8b at 4"),
        (b"a,answer\r1,2\r", r"row 1 \(line 1\): a carriage return stands within a line"),
        (b"PAR1", "is Parquet, not csv; remove data_format"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_row_and_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(data)
    with pytest.raises(BadDataset, match=says):
        list(rows_of(path, form="csv", columns=TEXT))


def test_a_quote_that_never_closes_does_not_take_the_file_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-080: a row has a bound, whoever wants it."""
    monkeypatch.setattr("smeltkit.limits.DATASET_ROW_MAX_BYTES", 1000)
    path = tmp_path / "table.csv"
    path.write_text('answer\n"' + "line\n" * 10_000)
    with pytest.raises(BadDataset, match="exceeds 1000 bytes, or a quote is never closed"):
        list(rows_of(path, form="csv", columns=TEXT))


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"data_format": "csv"}, BadConfig, r"needs columns that hold text: columns: \{text: NAME\}"),
        ({"data_format": "tsv", "columns": {"ids": "i"}}, BadConfig, "needs columns that hold text"),
        ({"data_format": "text", "columns": {"text": "a"}}, UnsupportedOption, "no effect with data_format=text"),
        ({"columns": {"prompt": "a"}}, BadConfig, "columns names prompt without response"),
        ({"columns": {"system": "a", "text": "b"}}, BadConfig, "system goes with both"),
        ({"columns": {"text": "a", "ids": "b"}}, BadConfig, "columns name text and ids"),
        ({"columns": {"txt": "a"}}, BadConfig, "did you mean columns.text"),
    ],
)
def test_columns_that_make_no_sense_are_refused(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_settings(json.dumps(value))


def test_the_ending_of_a_file_says_what_it_is() -> None:
    """Held-out rows are read as the training rows are."""
    file = Path("training.yaml")
    assert form_of(["a.CSV", "b.csv"], file) == {"data_format": "csv"} and form_of(["a.tsv"], file) == {
        "data_format": "tsv"
    }
    assert form_of(["a.jsonl", "b.parquet"], file) == {}
    with pytest.raises(BadConfig, match=r"a.csv, b.jsonl are of different kinds"):
        form_of(["a.csv", "b.jsonl"], file)
