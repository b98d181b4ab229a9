"""Data tokenized once by several processes: the samples of one process, kept, verified, shared and dropped again."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.trainer.data import kept
from services.trainer.data.dataset import Dataset, open_dataset, read_dataset
from services.trainer.data.kept import Kept, keep_samples, names_of
from services.trainer.data.recipe import Recipe
from services.trainer.data.stored import SampleFile, is_sealed, open_sealed
from services.trainer.data.tokenize import make_shards, tokenize
from services.trainer.settings.training import parse_settings
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import BadDataset, DigestMismatch, DiskFull, JobCancelled, UnsupportedOption
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage

EXAMPLE = Path(__file__).parents[4] / "examples/models/ore-11m"
DIGEST = "sha256:" + "1" * 64


def _recipe(**settings: Any) -> Recipe:
    contract = Bundle.from_folder(EXAMPLE, lineage=Lineage(operation="import", code_revision="test")).contract
    return Recipe.of(contract, parse_settings(json.dumps({"sequence_tokens": 64, **settings})))


def _chat(number: int) -> dict[str, Any]:
    answer = f"def f{number}(x):\n    return x + {number}\n" * (1 + number % 9)
    return {
        "messages": [{"role": "user", "content": f"Add {number}."}, {"role": "assistant", "content": answer.strip()}]
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as lines, with an empty one among them."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:7], "", *lines[7:], ""]))
    return path


def _tokenized(path: Path, recipe: Recipe, folder: Path, **options: Any) -> Dataset:
    tokenize(path, DIGEST, EXAMPLE, recipe, folder / "shards", folder / "made", shard_rows=10, **options)
    assert not list((folder / "shards").glob("*.samples")) and is_sealed(folder / "made")
    return open_dataset(folder / "made")


def _directly(path: Path, recipe: Recipe) -> Dataset:
    encoder = recipe.encoder(EXAMPLE)
    found = read_dataset(
        path, encoder, recipe.sequence_tokens, text_only=recipe.text_only, infill=recipe.infill(encoder)
    )
    return replace(found, digest=DIGEST)


def _is_same(one: Dataset, other: Dataset) -> bool:
    pairs = zip(one.samples, other.samples, strict=True)
    same = all((a.ids == b.ids).all() and (a.targets == b.targets).all() for a, b in pairs)
    told = [
        (each.digest, each.rows, each.too_long, each.rearranged, each.tokens, each.counted) for each in (one, other)
    ]
    return same and told[0] == told[1] and one.samples.lengths == other.samples.lengths


@pytest.mark.parametrize("kind", ["conversations", "texts"])
def test_several_processes_make_the_samples_of_one(tmp_path: Path, kind: str) -> None:
    """R-080: ids, targets, order, rows left out and rearranged are those of reading row by row, to the bit."""
    chats, texts = [_chat(n) for n in range(45)], [{"text": "x = [1, 2]\n" * (1 + n * 7 % 31)} for n in range(45)]
    recipe = _recipe(method="pretrain", fim={"share": 0.5}, seed=3) if kind == "texts" else _recipe()
    path = _write(tmp_path / "data.jsonl", texts if kind == "texts" else chats)
    expected = _directly(path, recipe)
    assert expected.rearranged > 5 if kind == "texts" else expected.too_long
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        assert _is_same(_tokenized(path, recipe, folder, processes=processes), expected)
    assert (
        len(json.loads((tmp_path / "3/made").read_bytes().rpartition(b'"shards":')[2].partition(b',"starts"')[0])) > 4
    )


def test_of_wrong_rows_the_first_is_told_whoever_finds_it(tmp_path: Path) -> None:
    """As by one process: the second process is told what the first one, with an earlier row, has found."""
    rows = [_chat(n) for n in range(40)]
    rows[14], rows[27] = {"text": 1}, {"prompt": "x"}
    path = _write(tmp_path / "data.jsonl", rows)
    with pytest.raises(BadDataset) as expected:
        _directly(path, _recipe())
    for processes in (1, 2):
        with pytest.raises(BadDataset) as found:
            _tokenized(path, _recipe(), tmp_path, processes=processes)
        assert found.value.message == expected.value.message and "row 16" in found.value.message
    with pytest.raises(UnsupportedOption, match="fim.share has no effect"):
        _tokenized(_write(tmp_path / "chats", [_chat(1)]), _recipe(fim={"share": 0.5}), tmp_path, processes=1)


def test_work_that_was_stopped_goes_on_with_the_next_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are whole or not there; those that are there are not made again."""
    path, recipe = _write(tmp_path / "data.jsonl", [_chat(n) for n in range(40)]), _recipe()

    def stop(rows: int) -> None:
        if rows == 20:
            raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        _tokenized(path, recipe, tmp_path, processes=1, tell=stop)
    made = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shards").glob("*.samples")}
    assert sorted(made) == ["0.samples", "1.samples"]
    make_shards(tmp_path / "shards", 0)
    assert all((tmp_path / "shards" / name).stat().st_mtime_ns == time_ns for name, time_ns in made.items())
    assert _is_same(_tokenized(path, recipe, tmp_path, processes=1), _directly(path, recipe))


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "data.jsonl", [_chat(n) for n in range(9)])

    def fail(self: SampleFile, sample: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(SampleFile, "add", fail)
    with pytest.raises(DiskFull, match="no space is left to tokenize data.jsonl; free some"):
        _tokenized(path, _recipe(), tmp_path, processes=1)


class Rig:
    """A store with one file of rows, a cache, and a folder a run."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 20) -> None:
        self.folder, self.store = folder, LocalStore(folder / "store")
        self.cache = NodeCache(folder / "cache", self.store, max_bytes)
        self.digest = self.put(30)

    def put(self, rows: int) -> str:
        """The digest of stored data."""
        return self.store.put_file(_write(self.folder / "rows", [_chat(n) for n in range(rows)]))[0]

    def keep(self, run: str, recipe: Recipe, digest: str = "", base: Path = EXAMPLE, name: str = "data") -> Kept:
        """The samples of the data in a run's folder."""
        (self.folder / run).mkdir(exist_ok=True)
        given = digest or self.digest
        return keep_samples(self.store, self.cache, given, base, recipe, self.folder / run, name, lambda rows: None)


def test_a_later_run_takes_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R-080: the same file on the disk; nothing is left beside it; one that was altered is made again, and said."""
    rig = Rig(tmp_path)
    first, second = rig.keep("first", _recipe()), rig.keep("second", _recipe())
    assert (first.processes, second.processes) == (1, 0) and first.path.samefile(second.path)
    assert [file.name for file in second.path.parent.iterdir()] == ["data.samples"]
    expected = replace(_directly(tmp_path / "rows", _recipe()), digest=rig.digest)
    assert _is_same(open_dataset(second.path), expected)
    before, data = first.path.stat(), bytearray(first.path.read_bytes())
    data[100] ^= 1
    first.path.chmod(0o644)
    first.path.write_bytes(data)
    os.utime(first.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DigestMismatch, match="shard 0 of 1, is not what was written"):
        open_sealed(second.path)
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "data.jsonl").write_text("a file of the run that is called alike\n")
    with caplog.at_level(logging.WARNING, kept.__name__):
        third = rig.keep("third", _recipe())
    assert "is made again" in caplog.text and third.processes == 1
    assert _is_same(open_dataset(third.path), expected)


def test_a_wrong_row_of_stored_data_is_told_by_what_the_data_are_for(tmp_path: Path) -> None:
    """A digest has no name, so none is made up: which file of how many, or that it is held out; and by the name that
    its user gave it, however long that is."""
    rig = Rig(tmp_path)
    wrong, _ = rig.store.put_file(_write(tmp_path / "wrong", [_chat(1), {"text": 5}]))
    assert names_of(1, False) == ["training data"]
    first, second, held = names_of(2, True, ["a.jsonl", "b.jsonl", "\N{SNOWMAN}" * 99])
    assert (first, len(held)) == ("a.jsonl (training data, file 1 of 2)", 33 + len(" (held-out data)"))
    for name in (*names_of(3, True)[1:3], names_of(1, True)[1], second, held):
        with pytest.raises(BadDataset, match=rf"^{re.escape(name)} row 2: text is 5"):
            rig.keep("run", _recipe(), wrong, name=name)


def test_whatever_changes_an_id_makes_another_file(tmp_path: Path) -> None:
    """Settings, contract, tokenizer, template and data do; a seed that rearranges nothing and a rate do not."""
    base = tmp_path / "base"
    shutil.copytree(EXAMPLE, base)
    plain = _recipe()
    assert plain == _recipe(seed=7, learning_rate=1e-4) and plain.digest(base) == plain.digest(EXAMPLE)
    others = [
        _recipe(sequence_tokens=32), _recipe(method="pretrain"), _recipe(data_format="text"),
        _recipe(fim={"share": 0.5}), _recipe(fim={"share": 0.5}, seed=1),
        replace(plain, contract=replace(plain.contract, eos_text="x")), replace(plain, ids_of="sha256:" + "2" * 64),
    ]  # fmt: skip
    digests = {recipe.digest(base) for recipe in (plain, *others)}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text()
        (base / name).write_text(text.replace("im_start", "im_begin"))
        digests.add(plain.digest(base))
        (base / name).write_text(text)
    assert len(digests) == len(others) + 3
    assert all(Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe for recipe in others)


def test_the_cache_drops_what_no_run_needs_and_says_when_it_is_too_small(tmp_path: Path) -> None:
    """A run's folder holds its data; what was used longest ago and is in none goes when room is needed."""
    rig = Rig(tmp_path, max_bytes=76_000)
    rig.keep("first", _recipe())
    more = rig.put(60)
    rig.keep("second", _recipe(), more)
    assert rig.keep("again", _recipe()).processes == 0
    for run in ("first", "second", "again"):
        shutil.rmtree(tmp_path / run)
    rig.keep("third", _recipe(), rig.put(90))
    assert rig.cache.size_bytes() <= 76_000
    assert (rig.keep("kept", _recipe()).processes, rig.keep("gone", _recipe(), more).processes) == (0, 1)
    with pytest.raises(DiskFull, match="make the cache larger"):
        rig.keep("huge", _recipe(), rig.put(900))
