"""Prompts: their wording is frozen by digest, and no test calls what its prompt does not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from suite_files import MBPP_ROWS, make_suite, published_problems

from services.evaluator import code
from services.evaluator.prompts import build_prompts, prompts_digest
from smeltkit.errors import BadSuite

GOLDEN = {
    ("basic", "completion", 1): "sha256:71dcc5c80e086a3b38b326675dc75eae41b4c8a97eb84fed4705d8730be60d1a",
    ("humaneval", "completion", 1): "sha256:8cb9c85244f6178fed1002ea34c33092bf9fbcec5e8f923f38482fc5a47f5dbc",
    ("mbpp", "tests-shown", 1): "sha256:dc7c8bc05a0854beb6ce7c0da8590fc10625b1a3032e867a690718e272c4c12b",
}


@pytest.mark.parametrize("key", GOLDEN, ids=lambda key: key[0])
def test_the_wording_of_a_prompt_version_never_changes(key: tuple[str, str, int], tmp_path: Path) -> None:
    """R-091: prompts are versioned data; a changed wording needs a new version."""
    suite, problems = published_problems(key[0], tmp_path)
    assert (suite.name, suite.builder, suite.prompt_version) == key
    assert prompts_digest(build_prompts(suite, problems)) == GOLDEN[key]


@pytest.mark.parametrize("name", ["basic", "humaneval", "mbpp"])
def test_every_identifier_that_a_test_calls_is_in_its_prompt(name: str, tmp_path: Path) -> None:
    """R-089: a model cannot guess the name that a hidden test calls."""
    suite, problems = published_problems(name, tmp_path)
    for problem, prompt in zip(problems, build_prompts(suite, problems), strict=True):
        tree = code.parse(f"{problem.setup}\n{problem.tests}")
        assert tree is not None
        asked = code.called(tree) & set(problem.exports) | {problem.entry_point} - {""}
        assert asked
        assert asked <= code.identifiers(prompt.content)


def test_a_name_that_only_the_tests_know_is_refused(tmp_path: Path) -> None:
    """R-089."""
    suite, problems, _ = make_suite(tmp_path, MBPP_ROWS, "mbpp")
    hidden = replace(problems[0], text="Sum two numbers.", shown_tests=("assert True",))
    with pytest.raises(BadSuite, match="Mbpp/11: tests read add, which the prompt does not show"):
        build_prompts(suite, [hidden])


def test_an_unknown_prompt_version_is_refused(tmp_path: Path) -> None:
    suite, problems, _ = make_suite(tmp_path)
    with pytest.raises(BadSuite, match="completion version 2; known: completion version 1"):
        build_prompts(replace(suite, prompt_version=2), problems)


def test_a_raw_prompt_is_the_suites_text_and_nothing_else(tmp_path: Path) -> None:
    suite, problems, _ = make_suite(tmp_path)
    prompts = build_prompts(suite, problems)
    assert [prompt.content for prompt in prompts] == [problem.prompt for problem in problems]
    assert not any(prompt.is_chat for prompt in prompts)


def test_a_chat_prompt_shows_task_setup_and_tests(tmp_path: Path) -> None:
    suite, problems, _ = make_suite(tmp_path, MBPP_ROWS, "mbpp")
    plain, prepared = build_prompts(suite, problems)
    assert plain.is_chat
    assert plain.content == (
        "Write a function to add two numbers.\nYour code should satisfy these tests:\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0"
    )
    assert prepared.content.splitlines()[2:] == ["head = Node(3)", "assert total(head) == 3"]
