"""Rows of a suite's data as immutable problems, with everything that follows from them worked out once.

The file's digest is checked first; after that every row, field and name is, so that a malformed suite is refused by
file, row and field before a single token is generated.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from services.evaluator import code
from services.evaluator.fields import Fields
from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.errors import BadSuite
from smeltkit.ids import digest_bytes


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task: what the model is shown and how its answer is judged."""

    id: str
    """Name in results, e.g. HumanEval/0 or Mbpp/11."""
    prompt: str
    """Code to be continued; empty where the task is told in words."""
    text: str
    """The task in words; empty where the prompt says it."""
    entry_point: str
    """The function asked for; empty where the tests call by name."""
    form: str
    tests: str
    shown_tests: tuple[str, ...]
    """Tests that the prompt may show."""
    setup: str
    """Code of the suite that runs after the solution is loaded, before the tests."""
    preamble: str
    """Trusted code that the tests need: what the prompt defines beside the entry function, where they read it."""
    exports: tuple[str, ...]
    """Names that a solution may provide to the tests: those that the reference binds and the tests read."""
    reference: str
    """The suite's own solution, a whole program."""
    profile: str = ""
    """The sandbox's interpreter that it is judged on; empty for the standard library alone."""


def load_problems(suite: Suite, data: bytes) -> tuple[Problem, ...]:
    """The problems of the suite's split, in order; BadSuite names file, row and field."""
    if (digest := digest_bytes(data)) != suite.data.digest:
        raise BadSuite(f"{suite.data.file}: has digest {digest}, suite {suite.name} declares {suite.data.digest}")
    rows = list(_rows(suite, data))
    if len(rows) != suite.data.rows:
        raise BadSuite(f"{suite.data.file}: has {len(rows)} rows, suite {suite.name} declares {suite.data.rows}")
    numbered = [_READERS[suite.data.format](row) for row in rows]
    chosen = [
        replace(problem, profile=suite.profile) for number, problem in numbered if suite.first <= number <= suite.last
    ]
    if len(chosen) != suite.problems:
        raise BadSuite(
            f"{suite.data.file}: {len(chosen)} problems are numbered {suite.first} to {suite.last},"
            f" suite {suite.name} declares {suite.problems}"
        )
    twice = [name for name, count in Counter(problem.id for problem in chosen).items() if count > 1]
    if twice:
        raise BadSuite(f"{suite.data.file}: problem {twice[0]} occurs twice")
    return tuple(chosen)


def _rows(suite: Suite, data: bytes) -> Iterator[Fields]:
    file = suite.data.file
    for index, line in enumerate(_unpacked(file, data).splitlines()):
        place = f"{file}: row {index + 1}"
        if len(line) > limits.SUITE_ROW_MAX_BYTES:
            raise BadSuite(f"{place}: has {len(line)} bytes, at most {limits.SUITE_ROW_MAX_BYTES} are allowed")
        try:
            value = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise BadSuite(f"{place}: no valid JSON: {error}") from error
        yield Fields(place, value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(value := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _unpacked(file: str, data: bytes) -> bytes:
    """The file's bytes, unpacked if its name ends in .gz, bounded whatever the archive claims."""
    if not file.endswith(".gz"):
        return data
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = unpacker.decompress(data, limits.SUITE_DATA_MAX_BYTES)
    except zlib.error as error:
        raise BadSuite(f"{file}: no valid gzip file: {error}") from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise BadSuite(f"{file}: is cut off, or unpacks to more than {limits.SUITE_DATA_MAX_BYTES} bytes")
    return text


def _read_humaneval(row: Fields) -> tuple[int, Problem]:
    """A row of HumanEval's format: a prompt to continue, and a test program that defines check(candidate)."""
    task, prompt, entry = row.text("task_id"), row.text("prompt"), row.text("entry_point")
    solution, tests = row.text("canonical_solution"), row.text("test")
    row.close()
    number, reference = _number(row, task), prompt + solution
    tree = code.parse(tests)
    if tree is None or "check" not in code.defined(tree):
        row.fail("test", "must be a program that defines check(candidate)")
    prompt_tree = code.parse(prompt)
    if prompt_tree is None or entry not in code.defined(prompt_tree):
        row.fail("entry_point", f"is {entry!r}, which the prompt does not define")
    has_helpers = bool((code.bound(prompt_tree) - {entry}) & code.read(tree))
    preamble = code.without(prompt, entry) if has_helpers else ""
    exports = {entry} | (_provided(row, "canonical_solution", reference, tree) - code.bound(prompt_tree))
    return number, Problem(
        id=task,
        prompt=prompt,
        text="",
        entry_point=entry,
        form="check",
        tests=tests,
        shown_tests=(),
        setup="",
        preamble=preamble,
        exports=tuple(sorted(exports)),
        reference=reference,
    )


def _read_mbpp(row: Fields) -> tuple[int, Problem]:
    """A row of MBPP: a task in words, a solution, and assertions that call it by name."""
    number = row.integer("task_id", 0, limits.SUITE_ROWS_MAX)
    text, solution = row.text("text"), row.text("code")
    setup, tests = row.text("test_setup_code", can_be_empty=True), row.texts("test_list")
    row.texts("challenge_test_list", can_be_empty=True)
    row.close()
    tree = code.parse(f"{setup}\n{_joined(tests)}")
    if tree is None:
        row.fail("test_list", "does not parse as Python")
    exports = _provided(row, "code", solution, tree)
    if not exports & code.called(tree):
        row.fail("test_list", "calls nothing that the solution defines")
    return number, Problem(
        id=f"Mbpp/{number}",
        prompt="",
        text=text,
        entry_point="",
        form="asserts",
        tests=_joined(tests),
        shown_tests=tests,
        setup=setup,
        preamble="",
        exports=tuple(sorted(exports)),
        reference=solution,
    )


def _read_bigcodebench(row: Fields) -> tuple[int, Problem]:
    """A row of BigCodeBench: a prompt with its imports to continue, and a module of test cases that lean on them."""
    task, prompt, entry = row.text("task_id"), row.text("complete_prompt"), row.text("entry_point")
    solution, tests = row.text("canonical_solution"), row.text("test")
    for told in ("instruct_prompt", "code_prompt", "doc_struct", "libs"):
        row.text(told, can_be_empty=True)
    row.close()
    prompt_tree, tree = code.parse(prompt), code.parse(tests)
    if prompt_tree is None or entry not in code.defined(prompt_tree):
        row.fail("entry_point", f"is {entry!r}, which complete_prompt does not define")
    if tree is None:
        row.fail("test", "does not parse as Python")
    reference = f"{prompt}\n{solution}"
    provided = _provided(row, "canonical_solution", reference, tree) - code.bound(prompt_tree)
    return _number(row, task), Problem(
        id=task,
        prompt=prompt,
        text="",
        entry_point=entry,
        form="unittest",
        tests=tests,
        shown_tests=(),
        setup="",
        preamble=code.without(prompt, entry),
        exports=tuple(sorted({entry} | provided)),
        reference=reference,
    )


def _number(row: Fields, task: str) -> int:
    number = task.rpartition("/")[2]
    if not (number.isascii() and number.isdigit()):
        row.fail("task_id", f"is {task!r}, must end in / and a number")
    return int(number)


def _provided(row: Fields, field: str, reference: str, tests: Any) -> frozenset[str]:
    """Names that the reference binds at top level and the tests read without making them themselves."""
    tree = code.parse(reference)
    if tree is None:
        row.fail(field, "does not parse as Python")
    return (code.bound(tree) & code.read(tests)) - code.bound(tests)


def _joined(tests: tuple[str, ...]) -> str:
    return "\n".join(tests)


_READERS: Mapping[str, Callable[[Fields], tuple[int, Problem]]] = {
    "humaneval": _read_humaneval,
    "mbpp": _read_mbpp,
    "bigcodebench": _read_bigcodebench,
}
