"""Suites as data: what ships loads, and whatever is wrong in a file is named by file and field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from suite_files import HUMANEVAL_ROWS, suite_values, to_lines, write_suite

from services.evaluator.suites import find_suite, load_suite, suites
from smeltkit.errors import BadSuite, UnknownSuite

DATA = to_lines(HUMANEVAL_ROWS)
Break = Callable[[dict[str, Any]], object]

BROKEN: dict[str, tuple[Break, str]] = {
    "no digest": (lambda v: v["data"].pop("digest"), "data: field 'digest' is missing"),
    "digest without its algorithm": (lambda v: v["data"].update(digest="ab" * 32), "field 'digest'"),
    "unknown key at the top": (lambda v: v.update(shots=5), "unknown field 'shots'"),
    "unknown key in a section": (lambda v: v["generation"].update(top_k=5), "generation: unknown field 'top_k'"),
    "section missing": (lambda v: v.pop("judge"), "field 'judge' is missing"),
    "section of another type": (lambda v: v.update(split=["all"]), "field 'split' must be dict, not list"),
    "text where a number belongs": (lambda v: v["split"].update(problems="2"), "field 'problems' must be int, not str"),
    "truth where a number belongs": (lambda v: v.update(version=True), "field 'version' must be int, not bool"),
    "more problems than rows": (lambda v: v["split"].update(problems=3), "field 'problems' is 3, must be 1 to 2"),
    "split that counts otherwise": (lambda v: v["split"].update(last=5), "field 'problems' is 2, but 0 to 5"),
    "unknown prompt builder": (lambda v: v["prompt"].update(builder="scot"), "must be one of completion, tests-shown"),
    "join of another kind": (lambda v: v["extraction"].update(joins=["reply"]), "field 'joins' holds 'reply'"),
    "no join": (lambda v: v["extraction"].update(joins=[]), "field 'joins' must not be empty"),
    "too many stop strings": (lambda v: v["generation"].update(stop=[str(i) for i in range(17)]), "has 17 entries"),
    "empty stop string": (lambda v: v["generation"].update(stop=[""]), "must hold non-empty strings"),
    "tokens out of range": (lambda v: v["generation"].update(max_tokens=0), "field 'max_tokens' is 0, must be 1 to"),
    "setup before the solution": (lambda v: v["judge"].update(setup="before-solution"), "after-solution"),
    "file outside its folder": (lambda v: v["data"].update(file="../x.jsonl"), "must be a plain file name"),
    "address without TLS": (lambda v: v["data"].update(url="http://example.org"), "must begin with https://"),
    "no licence": (lambda v: v["data"].update(licence=""), "field 'licence' must not be empty"),
    "another name than the file's": (lambda v: v.update(name="huge"), "must be the file's name 'tiny'"),
}


def test_the_shipped_suites_load_and_name_their_split() -> None:
    """R-092: a score can name suite and split size."""
    found = {name: (suite.split, suite.problems, suite.data.rows) for name, suite in suites().items()}
    assert found == {"basic": ("all", 200, 200), "humaneval": ("all", 164, 164), "mbpp": ("test", 500, 974)}


def test_an_unknown_suite_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownSuite, match="known: basic, humaneval, mbpp"):
        find_suite("humanevil")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_suite_file_is_refused_by_file_and_field(case: str, tmp_path: Path) -> None:
    """R-014: an unparsable suite is an error, never skipped."""
    change, message = BROKEN[case]
    values = suite_values(DATA)
    change(values)
    with pytest.raises(BadSuite) as caught:
        load_suite(write_suite(tmp_path, values))
    assert "tiny.yaml" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "name: [", "name: tiny\nname: tiny\n", "a: &a [*a]\n", "!!python/object:os.system x", "\x00"],
    ids=["empty", "list", "cut off", "key twice", "cycle", "python object", "control character"],
)
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    with pytest.raises(BadSuite, match="tiny.yaml"):
        load_suite(path)


def test_any_change_of_a_suite_changes_its_digest(tmp_path: Path) -> None:
    values = suite_values(DATA)
    before = load_suite(write_suite(tmp_path, values)).digest
    values["generation"]["max_tokens"] += 1
    assert load_suite(write_suite(tmp_path, values)).digest != before
