"""Secrets in files: the first line is shown, each is accepted, a file that changes is read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from smeltkit.errors import BadConfig
from smeltkit.secret import Secret


def replace(path: Path, text: str) -> None:
    """As a mounted secret is replaced: another file takes the name."""
    other = path.with_suffix(".new")
    other.write_text(text)
    os.replace(other, path)


def test_a_text_is_shown_and_accepted() -> None:
    secret = Secret("abc")
    assert secret() == "abc" and secret.accepts("abc") and not secret.accepts("abd") and not secret.accepts("")


def test_none_is_empty_and_false() -> None:
    assert not Secret() and Secret()() == ""


def test_a_file_is_followed_and_both_lines_are_good_while_it_holds_two(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old\n")
    secret = Secret(file=str(path))
    replace(path, "old\nnew\n")
    assert secret() == "old" and secret.accepts("new")
    replace(path, "new\nold\n")
    assert secret() == "new" and secret.accepts("old")
    replace(path, "new\n")
    assert secret() == "new" and not secret.accepts("old")


@pytest.mark.parametrize("text", ["", "\n \n", "m\u00fcll"])
def test_what_is_no_secret_is_refused_at_the_start_and_left_aside_later(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text("good\n")
    secret = Secret(file=str(path))
    replace(path, text)
    assert secret() == "good"
    with pytest.raises(BadConfig, match=str(path)):
        Secret(file=str(path))
    path.unlink()
    assert secret() == "good"


def test_a_file_that_is_missing_and_two_places_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read"):
        Secret(file=str(tmp_path / "nowhere"))
    with pytest.raises(BadConfig, match="leave one of the two out"):
        Secret("abc", file=str(tmp_path / "nowhere"))


def test_a_secret_is_not_shown_in_logs() -> None:
    assert "hunter2" not in repr(Secret("hunter2"))
