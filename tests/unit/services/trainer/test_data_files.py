"""Data files of every kind, samples that lie in a file, and an order of epochs that stays what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from services.trainer.data import rows
from services.trainer.data.dataset import Dataset, read_dataset
from services.trainer.data.order import Order
from services.trainer.data.samples import Encoder
from services.trainer.settings.training import parse_settings
from smeltkit.errors import BadConfig, BadDataset, NotBuilt
from smeltkit.ids import digest_bytes
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import write_tiny_model

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(600)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny_model(folder, "qwen2")
    return folder


def _encoder(base: Path, **options: Any) -> Encoder:
    lineage = Lineage(operation="import", code_revision="test")
    return Encoder(base, Bundle.from_folder(base, lineage=lineage).contract, **options)


def _table(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


def _same(one: Dataset, other: Dataset) -> bool:
    pairs = zip(one.samples, other.samples, strict=True)
    return all((a.ids == b.ids).all() and (a.targets == b.targets).all() for a, b in pairs)


def test_parquet_holds_the_rows_that_jsonl_holds(tmp_path: Path, base: Path) -> None:
    """R-080: told by its bytes, whatever its name; row groups one by one; other columns are not read."""
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    column = [row["messages"] for row in ROWS]
    table = _table(tmp_path / "rows", messages=column, source=["x"] * len(ROWS))
    found = read_dataset(table, _encoder(base), 128)
    assert _same(found, read_dataset(lines, _encoder(base), 128)) and found.rows == 600
    texts = _table(tmp_path / "texts", text=["one and two", "three"])
    assert len(read_dataset(texts, _encoder(base), 128, text_only=True).samples) == 2


def test_broken_or_unfitting_parquet_is_named(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crafted file gives a typed error; so does a machine without pyarrow, with what to install."""
    wrong = _table(tmp_path / "wrong", prompt=["a"], answer=["b"])
    with pytest.raises(BadDataset, match=r"columns prompt, answer; exactly one of messages, text"):
        read_dataset(wrong, _encoder(base), 64)
    cut = tmp_path / "cut"
    cut.write_bytes(_table(tmp_path / "whole", text=["a b c"] * 50).read_bytes()[:-20])
    with pytest.raises(BadDataset, match="cut is broken Parquet"):
        read_dataset(cut, _encoder(base), 64)
    with pytest.raises(BadDataset, match="row 2"):
        read_dataset(_table(tmp_path / "null", text=["a b", None]), _encoder(base), 64)
    monkeypatch.setattr(rows, "find_spec", lambda name: None)
    with pytest.raises(NotBuilt, match=r"pip install 'smelt\[parquet\]'"):
        read_dataset(wrong, _encoder(base), 64)


def test_a_text_file_is_one_document(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces like any long text; as rows it is refused with the setting that takes it."""
    path, text = tmp_path / "book.txt", "def f(x):\n    return x\n" * 30
    path.write_text(text)
    encoder = _encoder(base)
    found = read_dataset(path, encoder, 32, form="text")
    learnt = [t for sample in found.samples for t in sample.targets.tolist() if t != IGNORED]
    assert found.rows == 1 and learnt == encoder.encode({"text": text}, "").ids[1:].tolist()
    with pytest.raises(BadDataset, match="set data_format: text"):
        read_dataset(path, encoder, 32)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadDataset, match="no UTF-8"):
        read_dataset(path, encoder, 32, form="text")
    monkeypatch.setattr("smeltkit.limits.DATASET_ROW_MAX_BYTES", 1)
    with pytest.raises(BadDataset, match="cut it into rows"):
        read_dataset(path, encoder, 32, form="text")


def test_rows_of_ids_need_the_tokenizer_that_made_them(tmp_path: Path, base: Path) -> None:
    """Tokenized shards are taken as they are, and only for the base whose tokenizer made them."""
    digest = digest_bytes((base / "tokenizer.json").read_bytes())
    shard = _table(tmp_path / "shard", ids=[[5, 6, 7, 8], [9, 10]])
    found = read_dataset(shard, _encoder(base, ids_of=digest), 64, text_only=True)
    assert found.samples[0].ids.tolist() == [5, 6, 7, 8] and found.samples[0].targets.tolist() == [6, 7, 8, IGNORED]
    with pytest.raises(BadDataset, match=f"ids_of: {digest}"):
        read_dataset(shard, _encoder(base), 64)
    with pytest.raises(BadDataset, match="tokenize them anew"):
        _encoder(base, ids_of="sha256:" + "0" * 64)
    for ids in ([5, 10**6], [5, -1], [5, "6"]):
        path = tmp_path / "ids.jsonl"
        path.write_text(json.dumps({"ids": ids}) + "\n")
        with pytest.raises(BadDataset, match="row 1 holds the id"):
            read_dataset(path, _encoder(base, ids_of=digest), 64)


def test_samples_lie_in_a_file_without_a_name(tmp_path: Path, base: Path) -> None:
    """R-080: in memory is where each begins, and nothing is left in the folder."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = read_dataset(path, _encoder(base), 128).samples
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]
    assert found.lengths == [len(sample.ids) for sample in found] and found.tokens == sum(found.lengths)
    assert found.counted == sum(sample.counted for sample in found)
    assert [len(sample.ids) for sample in found[3:6]] == found.lengths[3:6]
    with pytest.raises(IndexError):
        found[600]


def test_the_order_of_a_seed_never_changes() -> None:
    """R-057: this very order was written down; a run of an older release resumes in it."""
    order = Order(lengths=tuple(1 + i * 7 % 30 for i in range(200)), pack_tokens=64, packs_per_step=3, seed=5)
    steps = [order.at(step) for step in range(order.steps_in(3))]
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest().startswith("6034e10fbf5d72d8")
    tokens = [sum(order.lengths[number] for number in pack) for step in steps for pack in step]
    fullest = order.fullest(len(steps))
    assert sum(order.lengths[number] for number in fullest) == max(tokens)
    assert order.tokens_in(len(steps)) == sum(tokens) == 3 * sum(order.lengths)


def test_the_order_of_many_samples_is_a_few_bytes_for_each() -> None:
    """R-080: a hundred thousand samples, several epochs: two epochs are kept, 4 bytes a sample and 16 a pack."""
    order = Order(lengths=[100] * 100_000, pack_tokens=1000, packs_per_step=4, seed=1)
    assert order.steps_in(4) == 10_000
    assert order.at(2500 * 3)[0] == order.packs(3)[0]
    kept = order._newest.values()
    assert len(kept) == 2
    assert all(packs._numbers.nbytes == 400_000 and packs._starts.nbytes == 8 * 10_001 for packs in kept)


def test_an_unknown_kind_of_data_is_refused() -> None:
    with pytest.raises(BadConfig, match="data_format='xml' must be one of rows, csv"):
        parse_settings('{"data_format": "xml"}')
