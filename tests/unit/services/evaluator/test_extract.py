"""Extraction over a corpus of replies, and what must hold for any text at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.evaluator import code
from services.evaluator.extract import Extraction, extract
from services.evaluator.problems import Problem

CORPUS = yaml.safe_load(Path(__file__).with_name("replies.yaml").read_text())
COMPLETION_JOINS, CHAT_JOINS = ("append", "newline", "indent", "whole"), ("reply",)


def _problem(**fields: Any) -> Problem:
    base = {"id": "T/0", "prompt": "", "text": "", "entry_point": "", "form": "check", "tests": "", "shown_tests": ()}
    return Problem(**{**base, "setup": "", "preamble": "", "exports": (), "reference": "", **fields})


DOUBLE = _problem(
    prompt='def double(x):\n    """Return x twice."""\n',
    entry_point="double",
    exports=("double",),
    tests="double(3) == 6",
)
ADD = _problem(form="asserts", exports=("add",), tests="add(2, 3) == 5")


def _extract(asked: str, reply: str) -> tuple[Problem, Extraction]:
    problem, joins = (DOUBLE, COMPLETION_JOINS) if asked == "completion" else (ADD, CHAT_JOINS)
    return problem, extract(problem, joins, reply)


def _passes(problem: Problem, program: str) -> bool:
    """Whether the program defines what is asked for and gets it right; it is the corpus's own, so it may run here."""
    names: dict[str, Any] = {}
    try:
        exec(program, names)
        return bool(eval(problem.tests, names))
    except Exception:
        return False


@pytest.mark.parametrize("entry", CORPUS, ids=lambda entry: entry["name"])
def test_a_reply_of_the_corpus_gives_its_program(entry: dict[str, Any]) -> None:
    """R-090: fences, trailing turns, thinking, no newline."""
    problem, found = _extract(entry["asked"], entry["reply"])
    assert (found.join, found.is_trimmed) == (entry["join"], entry.get("trimmed", False)), found.program
    if entry["name"] != "exit as the body":
        assert _passes(problem, found.program) == entry.get("passes", True), found.program


def test_the_corpus_is_large_enough() -> None:
    """R-090."""
    assert len(CORPUS) >= 25
    assert len({entry["reply"] for entry in CORPUS}) == len(CORPUS)


def test_a_prompt_without_a_final_newline_is_joined_on_a_new_line() -> None:
    """The two join modes are tried in order, and the one that worked is recorded."""
    problem = _problem(prompt='def double(x):\n    """Return x twice."""', entry_point="double")
    found = extract(problem, COMPLETION_JOINS, "    return 2 * x")
    assert found == Extraction(program=f"{problem.prompt}\n    return 2 * x", join="newline", is_trimmed=False)


def test_a_suite_that_allows_one_join_tries_no_other() -> None:
    found = extract(DOUBLE, ("append",), "return 2 * x\n")
    assert found.join == "raw"


def test_a_program_without_a_join_is_judged_as_it_is() -> None:
    """The verdict then shows what is wrong, and nothing is repaired in silence."""
    found = extract(DOUBLE, COMPLETION_JOINS, "    return (2 *\n")
    assert (found.join, found.program) == ("raw", DOUBLE.prompt + "    return (2 *\n")


def test_a_whole_program_keeps_what_the_prompt_defines_beside_the_function() -> None:
    problem = _problem(
        prompt='import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    """Doc."""\n', entry_point="f"
    )
    found = extract(problem, COMPLETION_JOINS, "```python\ndef f(x):\n    return half(math.sqrt(x))\n```")
    names: dict[str, Any] = {}
    exec(found.program, names)
    assert names["f"](16) == 2.0


@pytest.mark.parametrize(
    "text",
    ["(" * 50_000, "-" * 50_000 + "1", "a." * 50_000 + "a", "9" * 10_000, "\x00", "lambda:" * 20_000, "if 1:\n" * 90],
    ids=["brackets", "signs", "dots", "digits", "NUL", "lambdas", "blocks"],
)
def test_text_that_breaks_parsers_is_no_program(text: str) -> None:
    assert code.parse(text) is None
    assert _extract("chat", f"```python\n{text}\n```")[1].join in ("raw", "none")


def test_a_reply_longer_than_any_program_is_refused() -> None:
    found = extract(ADD, CHAT_JOINS, "def add(a, b):\n    return a + b\n" + "#" * 300_000)
    assert (found.join, found.program) == ("too-long", "")


def test_a_reply_of_many_broken_beginnings_ends_soon() -> None:
    """Every line starts like code and none parses: the attempts are bounded, whatever the length."""
    assert _extract("chat", "import (\n" * 20_000)[1].join == "raw"


_CODE = (
    "def add(a, b):\n",
    "    return a + b\n",
    "class X:\n",
    "import os\n",
    "@",
    "x: int\n",
    "(",
    ")",
    "'''",
    "    ",
)
_TEXT = ("```python\n", "```\n", "<think>", "</think>", "<|im_end|>", "word ", "\n", "\r", "\x0c", "\u2028")
_PIECES = st.sampled_from(_CODE + _TEXT)


@given(st.lists(_PIECES, max_size=24).map("".join) | st.text(max_size=200), st.sampled_from(["completion", "chat"]))
def test_whatever_is_extracted_by_a_join_parses_and_answers(reply: str, asked: str) -> None:
    """R-090: property over any text: no crash, same result again, and a join's program has what was asked for."""
    problem, found = _extract(asked, reply)
    assert found == _extract(asked, reply)[1]
    if found.join in COMPLETION_JOINS + CHAT_JOINS:
        tree = code.parse(found.program)
        assert tree is not None
        assert code.has_body(tree, "double") if problem.entry_point else "add" in code.bound(tree)
