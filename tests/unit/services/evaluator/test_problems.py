"""Rows become problems: what follows from a row is worked out right, and a malformed row is named."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bigcodebench_rows import BIGCODEBENCH_ROWS
from suite_files import HUMANEVAL_ROWS, MBPP_ROWS, make_suite, published_problems, suite_values, to_lines, write_suite

from services.evaluator.problems import load_problems
from services.evaluator.suites import load_suite
from smeltkit.errors import BadSuite
from smeltkit.ids import digest_bytes

Row = dict[str, Any]


def test_preamble_is_what_the_prompt_defines_beside_the_entry_function(tmp_path: Path) -> None:
    """A completion that redefines a helper of the prompt does not change the tests' own."""
    _, (plain, helped), _ = make_suite(tmp_path)
    assert plain.preamble == ""
    assert helped.preamble == "import math\n\n\ndef square(x):\n    return x * x\n\n\n"


def test_exports_are_what_the_reference_makes_and_the_tests_read(tmp_path: Path) -> None:
    _, problems, _ = make_suite(tmp_path)
    assert [problem.exports for problem in problems] == [("double",), ("root",)]
    _, chat, _ = make_suite(tmp_path, MBPP_ROWS, "mbpp")
    assert [problem.exports for problem in chat] == [("add",), ("Node", "total")]


def test_setup_is_kept_apart_from_the_tests(tmp_path: Path) -> None:
    """The order is the sandbox's: solution, setup, tests."""
    _, (_, problem), _ = make_suite(tmp_path, MBPP_ROWS, "mbpp")
    assert (problem.setup, problem.tests) == ("head = Node(3)", "assert total(head) == 3")


def test_a_row_of_bigcodebench_keeps_what_its_tests_borrow(tmp_path: Path) -> None:
    """Its test cases lean on the prompt's imports and constants: they are the tests' own, whatever a solution binds."""
    data = to_lines(BIGCODEBENCH_ROWS)
    values = suite_values(data, format="bigcodebench")
    values["judge"] = {"form": "unittest", "setup": "after-solution", "profile": "science"}
    first, patched, plain = load_problems(load_suite(write_suite(tmp_path, values)), data)
    assert (first.preamble, first.exports) == ("import numpy as np\nSCALE = 2\n\n", ("task_func",))
    assert {problem.profile for problem in (first, patched, plain)} == {"science"}
    assert plain.reference.endswith('words."""\n    return dict(Counter(words))\n')


def test_only_the_split_is_taken(tmp_path: Path) -> None:
    """Rows outside of the split are checked too, but are no problems."""
    data = to_lines(MBPP_ROWS)
    values = suite_values(data, format="mbpp")
    values["split"] = {"name": "test", "first": 12, "last": 12, "problems": 1}
    values["references_passed"] = 1
    suite = load_suite(write_suite(tmp_path, values))
    assert [problem.id for problem in load_problems(suite, data)] == ["Mbpp/12"]


@pytest.mark.parametrize(("name", "count"), [("basic", 200), ("humaneval", 164), ("mbpp", 500)])
def test_the_real_data_gives_every_problem_of_its_split(name: str, count: int, tmp_path: Path) -> None:
    _, problems = published_problems(name, tmp_path)
    assert len({problem.id for problem in problems}) == count
    assert all(problem.exports for problem in problems)


def test_three_problems_of_humaneval_need_helpers_of_their_prompts(tmp_path: Path) -> None:
    _, problems = published_problems("humaneval", tmp_path)
    helped = {problem.id for problem in problems if problem.preamble}
    assert helped == {"HumanEval/32", "HumanEval/38", "HumanEval/50"}


ROWS = {"humaneval": HUMANEVAL_ROWS, "mbpp": MBPP_ROWS, "bigcodebench": BIGCODEBENCH_ROWS}
BROKEN: dict[str, tuple[str, Callable[[Row], object], str]] = {
    "missing field": ("humaneval", lambda row: row.pop("test"), "field 'test' is missing"),
    "unknown field": ("humaneval", lambda row: row.update(hint="x"), "unknown field 'hint'"),
    "number for text": ("humaneval", lambda row: row.update(prompt=7), "field 'prompt' must be str, not int"),
    "empty text": ("humaneval", lambda row: row.update(prompt=""), "field 'prompt' must not be empty"),
    "id without number": ("humaneval", lambda row: row.update(task_id="Tiny/one"), "must end in / and a number"),
    "tests that do not parse": (
        "humaneval",
        lambda row: row.update(test="def check("),
        "field 'test' must be a program",
    ),
    "tests without check": ("humaneval", lambda row: row.update(test="x = 1"), "that defines check(candidate)"),
    "entry that is not there": (
        "humaneval",
        lambda row: row.update(entry_point="f"),
        "which the prompt does not define",
    ),
    "prompt that does not parse": ("humaneval", lambda row: row.update(prompt="def ("), "does not define"),
    "reference that does not parse": ("mbpp", lambda row: row.update(code="def add("), "field 'code' does not parse"),
    "test that does not parse": ("mbpp", lambda row: row.update(test_list=["assert ("]), "'test_list' does not parse"),
    "no tests": ("mbpp", lambda row: row.update(test_list=[]), "field 'test_list' must not be empty"),
    "tests of something else": ("mbpp", lambda row: row.update(test_list=["assert len([]) == 0"]), "calls nothing"),
    "solution that does not parse": (
        "bigcodebench",
        lambda row: row.update(canonical_solution="  ("),
        "field 'canonical_solution' does not parse",
    ),
    "task without its function": (
        "bigcodebench",
        lambda row: row.update(entry_point="other"),
        "which complete_prompt does not define",
    ),
    "cases that do not parse": ("bigcodebench", lambda row: row.update(test="class ("), "'test' does not parse"),
    "negative id": ("mbpp", lambda row: row.update(task_id=-1), "field 'task_id' is -1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_refused_by_file_row_and_field(case: str, tmp_path: Path) -> None:
    format, change, message = BROKEN[case]
    rows = [dict(row) for row in ROWS[format]]
    change(rows[0])
    with pytest.raises(BadSuite) as caught:
        make_suite(tmp_path, rows, format)
    assert "tiny.jsonl: row 1" in str(caught.value)
    assert message in str(caught.value)


def test_data_with_another_digest_is_refused(tmp_path: Path) -> None:
    suite, _, data = make_suite(tmp_path)
    with pytest.raises(BadSuite, match="has digest sha256:.*declares"):
        load_problems(suite, data + b"\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{\n", "row 1: no valid JSON"),
        (b'{"a": 1, "a": 2}\n', "a key occurs twice"),
        (b"[1]\n", "must be a mapping of fields, not list"),
        (b"[" * 100_000 + b"\n", "no valid JSON"),
        (b"\xff\xfe\n", "no valid JSON"),
    ],
    ids=["cut off", "key twice", "list", "deep", "no text"],
)
def test_a_row_that_is_no_object_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path, suite_values(data)))
    with pytest.raises(BadSuite, match=message):
        load_problems(suite, data)


def test_a_problem_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSuite, match="2 problems are numbered|occurs twice"):
        make_suite(tmp_path, [HUMANEVAL_ROWS[0], HUMANEVAL_ROWS[0]])


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"no gzip", "no valid gzip file"),
        (gzip.compress(to_lines(HUMANEVAL_ROWS))[:-9], "is cut off"),
        (gzip.compress(b"\0" * (65 << 20)), "unpacks to more than"),
    ],
    ids=["other format", "cut off", "bomb"],
)
def test_a_bad_archive_is_refused_without_being_unpacked_whole(packed: bytes, message: str, tmp_path: Path) -> None:
    values = suite_values(to_lines(HUMANEVAL_ROWS))
    values["data"] |= {"file": "tiny.jsonl.gz", "digest": digest_bytes(packed)}
    suite = load_suite(write_suite(tmp_path, values))
    with pytest.raises(BadSuite, match=message):
        load_problems(suite, packed)
