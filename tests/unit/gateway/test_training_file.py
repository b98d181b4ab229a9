"""Training files as they are read: what is refused, and that its message says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli.training_file import read_file
from smeltkit import limits
from smeltkit.errors import BadConfig

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
