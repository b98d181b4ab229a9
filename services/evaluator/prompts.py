"""Prompts of a suite, built by versioned builders: a changed wording is a new version, never an edit.

A golden test holds the digest of every version over its whole suite. docs/evaluation.md says how each was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from services.evaluator import code
from services.evaluator.problems import Problem
from services.evaluator.suites import Suite
from smeltkit.errors import BadSuite
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is asked: raw text to continue, or one user message for the bundle's chat template."""

    content: str
    is_chat: bool


Builder = Callable[[Problem], Prompt]


def build_prompts(suite: Suite, problems: Iterable[Problem]) -> tuple[Prompt, ...]:
    """The prompts of `problems` in their order.

    BadSuite if the suite's version of its builder is unknown, or if a test calls a name that the prompt does not show:
    no model can guess it (R-089).
    """
    builder = _BUILDERS.get((suite.builder, suite.prompt_version))
    if builder is None:
        known = ", ".join(f"{name} version {version}" for name, version in _BUILDERS)
        raise BadSuite(
            f"{suite.name}.yaml: field 'prompt' asks for {suite.builder} version {suite.prompt_version}; known: {known}"
        )
    return tuple(_checked(problem, builder(problem)) for problem in problems)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """The digest of prompts in their order."""
    return digest_bytes(canonical_json([[prompt.is_chat, prompt.content] for prompt in prompts]))


def _checked(problem: Problem, prompt: Prompt) -> Prompt:
    hidden = set(problem.exports) - code.identifiers(prompt.content)
    if hidden:
        raise BadSuite(f"{problem.id}: tests read {', '.join(sorted(hidden))}, which the prompt does not show")
    return prompt


def _completion(problem: Problem) -> Prompt:
    """The code to be continued, as it is: no chat template, nothing added."""
    return Prompt(content=problem.prompt, is_chat=False)


def _tests_shown(problem: Problem) -> Prompt:
    """The task in words, then its tests, one a line, after the code that they run on."""
    tests = "\n".join((*problem.setup.splitlines(), *problem.shown_tests))
    return Prompt(content=f"{problem.text}\nYour code should satisfy these tests:\n{tests}", is_chat=True)


_BUILDERS: Mapping[tuple[str, int], Builder] = {("completion", 1): _completion, ("tests-shown", 1): _tests_shown}
