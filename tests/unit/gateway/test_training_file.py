"""Training files as they are read: what is refused, and that its message says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from gateway.cli.training_file import read_file, specs_of
from smeltkit import limits
from smeltkit.errors import BadConfig, SmeltError, UnknownSource

PLAIN = "base: ore\ndata: a.jsonl\nname: ore:x\n"


def _file(folder: Path, text: str) -> Path:
    path = folder / "training.yaml"
    path.write_text(text)
    return path


def test_a_file_beyond_the_bound_is_refused_and_not_cut(tmp_path: Path) -> None:
    room = limits.TRAIN_SETTINGS_MAX_BYTES - len(PLAIN)
    assert read_file(_file(tmp_path, PLAIN + "#" * room))["name"] == "ore:x"
    with pytest.raises(BadConfig, match=r"has 262,146 bytes; 262,144 at most can be in a training file"):
        read_file(_file(tmp_path, PLAIN + "#" * room + "#\n"))


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("data: b.jsonl\n", "'data' occurs twice, in lines 2 and 4"),
        ("lora:\n  rank: 4\n  rank: 8\n", "'rank' occurs twice, in lines 5 and 6"),
        ("stages:\n  - {data: a.jsonl}\n  - data:\n      {a.jsonl: 1,\n       a.jsonl: 2}\n", "lines 7 and 8"),
        ("1: a\n0x1: b\n", "key 1 occurs twice, in lines 4 and 5"),
        ("seed: 2026-13-01\n", "month must be in"),
    ],
)
def test_a_key_that_occurs_twice_is_refused_at_any_depth(added: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=says):
        read_file(_file(tmp_path, PLAIN + added))


@pytest.mark.parametrize("added", ["seed: 2026-01-01\n", "lora: &a {rank: [*a]}\n", "lora: {[1, 2]: 3}\n"])
def test_what_no_setting_can_be_is_refused(added: str, tmp_path: Path) -> None:
    """A date, what holds itself, and a key of several parts."""
    with pytest.raises(BadConfig, match="training.yaml"):
        read_file(_file(tmp_path, PLAIN + added))


def test_a_key_may_be_said_again_over_one_that_is_merged(tmp_path: Path) -> None:
    text = "sweep:\n  one: &one {rank: 4, alpha: 8}\n  two: &two {<<: *one, rank: 8}\nlora: {<<: *two, alpha: 4}\n"
    assert read_file(_file(tmp_path, text))["lora"] == {"rank": 8, "alpha": 4}


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ({"name": "ore:x", "data": "a"}, BadConfig, "base is missing, the model to start from"),
        (
            {"base": 5, "name": "ore:x", "data": "a"},
            BadConfig,
            "base, the model to start from, is read as 5, which is no text; put it in quotes",
        ),
        (
            {"base": "ore", "name": None, "data": "a"},
            BadConfig,
            "name, the name of the result, has no value; write one",
        ),
        ({"base": "ore", "name": "ore:x", "data": "."}, UnknownSource, "is a folder; name the files"),
        ({"base": "ore", "name": "ore:x", "data": ["a", "b", "a"]}, BadConfig, "data names a more than once; say how"),
        ({"base": "ore", "name": "ore:x", "data": ["a", 1]}, BadConfig, "data is missing, or neither a file"),
        ({"base": "ore", "name": "ore:x", "data": "a"}, UnknownSource, "a does not exist; training.yaml names"),
    ],
)
async def test_what_a_training_names_wrongly_is_told_with_its_value(
    value: dict[str, Any], error: type[SmeltError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        await specs_of(Mock(), tmp_path / "training.yaml", [value])


async def test_messages_may_call_data_by_their_names_without_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-127: also of a path that is not below the file's own folder, and of a name that no line could hold."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / "a.jsonl", tmp_path / "b\x1b.jsonl", tmp_path / "c.jsonl"]
    for path in paths:
        path.touch()
    stored = AsyncMock(return_value=[Mock(digest=f"sha256:{n}") for n in range(3)])
    monkeypatch.setattr("gateway.cli.uploads.upload", stored)
    value = {"base": "ore", "name": "ore:x", "data": ["in/a.jsonl", "b\x1b.jsonl"], "heldout": str(paths[2])}
    (spec,) = await specs_of(Mock(), tmp_path / "training.yaml", [value])
    assert list(spec.dataset_names) == ["a.jsonl", "b?.jsonl", "c.jsonl"] and len(spec.datasets) == 3
    assert str(tmp_path) not in str(spec)
