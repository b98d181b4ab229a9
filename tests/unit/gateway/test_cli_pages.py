"""Commands that the pages tell people to type are commands: the command line's own parser takes them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_COMMAND = re.compile(r"(?:^|`)(?:[A-Z_0-9]+=\S+ +)*smelt ([a-z][^`\n]*)", re.MULTILINE)
_SHELL = frozenset("|;&<>")


def commands_of(text: str) -> list[list[str]]:
    """The words after `smelt` of each command that stands in `text`, in a line of its own or between backquotes."""
    return [_until_shell(found.rstrip("\\")) for found in _COMMAND.findall(text)]


def problem_of(words: list[str]) -> str:
    """What the command line has against `words`; empty for nothing. Arguments may be missing: prose leaves them out."""
    try:
        command: Any = main._load(words.pop(0)) if words[0] in main._COMMANDS else None
        while hasattr(command, "commands") and words:
            command = command.commands.get(words.pop(0))
        if command is None:
            return "no such command"
        _, rest, _ = command.make_parser(command.context_class(command)).parse_args(list(words))
    except Exception as error:  # of typer's own copy of click, which is not public
        return str(error)
    return f"unexpected {rest}" if rest else ""


def _until_shell(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    words = list(lexer)
    return words[: next((index for index, word in enumerate(words) if set(word) <= _SHELL), len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_is_one(page: Path) -> None:
    wrong = {" ".join(words): problem_of(list(words)) for words in commands_of(page.read_text())}
    assert {command: problem for command, problem in wrong.items() if problem} == {}


@pytest.mark.parametrize(
    "line",
    ["smelt bogus", "smelt jobs bogus", "SMELT_GATEWAY=a:1 smelt jobs ls --bogus | head", "see `smelt logs a b`"],
)
def test_a_command_that_is_none_is_found(line: str) -> None:
    assert [problem for words in commands_of(line) if (problem := problem_of(words))] != []
