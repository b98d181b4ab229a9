"""Stored completions in the place of a model: the same harness judges them, and generates nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from services.evaluator.fields import Fields
from services.evaluator.ports import Completion, Engine, Generation
from services.evaluator.problems import Problem
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.errors import BadFile, BadSuite

ENGINE = "stored completions"


class StoredCompletions:
    """Answers as an inference service would, from completions by problem; `digest` names where they come from."""

    def __init__(self, digest: str, completions: Mapping[str, tuple[str, ...]]) -> None:
        self._digest, self._completions = digest, completions

    def settings(self, suite: Suite) -> Settings:
        """Settings that stand for the file: as many samples as it has; problems without any have empty ones."""
        return Settings(
            samples=max(len(texts) for texts in self._completions.values()),
            temperature=0,
            top_p=1,
            seed=0,
            max_tokens=suite.max_tokens,
            problems=suite.problems,
        )

    async def load(self, bundle: str) -> Engine:
        """An engine that stands for the file."""
        return Engine(name=ENGINE, digest=self._digest, context_tokens=limits.EVALUATION_TOKENS_MAX, slots=1)

    async def generate(self, generation: Generation) -> Completion:
        """The stored completion of the sample; an empty one for a problem that has none."""
        texts = self._completions.get(generation.problem)
        return Completion(
            text=texts[generation.sample] if texts else "",
            finish_reason="stop" if texts else "none",
            prompt_tokens=0,
            completion_tokens=0,
            effective=generation.settings(),
            engine={"name": ENGINE, "digest": self._digest},
        )

    async def count_tokens(self, generation: Generation) -> int:
        """None: nothing is tokenized."""
        return 0


def read_completions(data: bytes, problems: Iterable[Problem]) -> dict[str, tuple[str, ...]]:
    """Completions by problem, of JSON lines with task_id and completion; several of one problem are its samples.

    BadFile names the line: no JSON, a field missing, unknown or of another type, a task that the suite does not have,
    problems with different numbers of completions, or no completion at all.
    """
    known = {problem.id for problem in problems}
    found: dict[str, list[str]] = {}
    for index, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        task, completion = _read_line(f"completions: row {index + 1}", line)
        name = task if task in known else f"Mbpp/{task}"
        if name not in known:
            raise BadFile(f"completions: row {index + 1}: field 'task_id' is {task!r}, which the suite does not have")
        found.setdefault(name, []).append(completion)
    if not found:
        raise BadFile("completions: there is none; give JSON lines with task_id and completion")
    fewest, most = (choose(found, key=lambda name: len(found[name])) for choose in (min, max))
    if len(found[fewest]) != len(found[most]):
        raise BadFile(
            f"completions: {fewest} has {len(found[fewest])} and {most} has {len(found[most])}; give all as many"
        )
    if len(found[most]) > limits.EVALUATION_SAMPLES_MAX:
        raise BadFile(f"completions: {most} has {len(found[most])}; allowed: 1 to {limits.EVALUATION_SAMPLES_MAX}")
    return {name: tuple(texts) for name, texts in found.items()}


def _read_line(place: str, line: bytes) -> tuple[str, str]:
    if len(line) > limits.SUITE_ROW_MAX_BYTES:
        raise BadFile(f"{place}: has {len(line)} bytes, at most {limits.SUITE_ROW_MAX_BYTES} are allowed")
    try:
        fields = Fields(place, json.loads(line))
        is_number = isinstance(fields.peek("task_id"), int)
        task = str(fields.integer("task_id", 0, limits.SUITE_ROWS_MAX)) if is_number else fields.text("task_id")
        completion = fields.text("completion", can_be_empty=True)
        fields.close()
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{place}: no valid JSON: {error}") from error
    except BadSuite as error:
        raise BadFile(error.message) from error
    return task, completion
