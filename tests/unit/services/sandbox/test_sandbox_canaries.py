"""Tests that run inside the candidate's process: random names, and canaries that only a forged answer lets pass."""

from __future__ import annotations

import random
import types
import unittest
from typing import Any

import pytest

from services.sandbox.judge.canaries import Plan, plan_tests
from services.sandbox.judge.inside import run_inside
from services.sandbox.judge.outcome import Failed, Refused

SOURCE = """
import unittest
class Base(unittest.TestCase):
    def setUp(self):
        self.expected = 4
    def test_double(self):
        self.assertEqual(double(2), self.expected)
class More(Base):
    def test_list(self):
        with self.subTest("one"):
            self.assertListEqual([double(1)], [2])
    def test_plain(self):
        if not double(1):
            return
        assert double(3) == 6
    def test_true(self):
        self.assertTrue(double(3) == 6)
"""


class Equal(int):
    """Equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def _plan(source: str = SOURCE, seed: int = 0) -> Plan:
    return plan_tests(source, random.Random(seed))


def _passing(plan: Plan, double: object) -> dict[str, bool]:
    """Method to whether it passes with this candidate."""
    module = types.ModuleType("planned")
    module.__dict__["double"] = double
    exec(plan.source, module.__dict__)
    results = {}
    for test in plan.order:
        result = unittest.TestResult()
        unittest.TestSuite([getattr(module, test.class_name)(test.method)]).run(result)
        results[f"{test.class_name}.{test.method}"] = result.wasSuccessful()
    return results


@pytest.mark.parametrize("seed", range(20))
def test_real_tests_pass_and_canaries_fail_for_an_honest_candidate(seed: int) -> None:
    plan = _plan(seed=seed)
    found = _passing(plan, lambda n: 2 * n)
    assert found == {f"{test.class_name}.{test.method}": not test.is_canary for test in plan.order}
    assert sum(test.is_canary for test in plan.order) in (3, 4)
    assert sorted(f"{test.class_name}.{test.original}" for test in plan.order if not test.is_canary) == [
        "Base.test_double",
        "More.test_double",
        "More.test_list",
        "More.test_plain",
        "More.test_true",
    ]


def test_always_equal_value_lets_a_canary_pass() -> None:
    """R-083: the altered test asks for a value that nothing honest equals."""
    forged = 0
    for seed in range(20):
        plan = _plan(seed=seed)
        found = _passing(plan, Equal)
        forged += any(found[f"{test.class_name}.{test.method}"] for test in plan.order if test.is_canary)
    assert forged >= 10


def test_names_say_nothing_about_what_is_a_canary() -> None:
    plan = _plan()
    assert all(len(test.method) == len("test_") + 16 for test in plan.order)
    assert "test_double" not in plan.source and plan.source != _plan(seed=1).source


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "class T: pass",
        "def test(:",
        "import unittest\n@unittest.skip('later')\nclass T(unittest.TestCase):\n    def test_a(self): pass",
        "import unittest\nclass T(unittest.TestCase):\n    @unittest.expectedFailure\n    def test_a(self): pass",
    ],
)
def test_tests_that_cannot_be_counted_are_refused(source: str) -> None:
    with pytest.raises(Refused):
        _plan(source)


class Answers:
    """A candidate's process that answers every request in one way."""

    def __init__(self, *answer: Any) -> None:
        self._answer = answer

    def load(self, names: list[str]) -> None:
        """Nothing to load."""

    def ask_inside(self, operation: str, *request: Any) -> list[Any]:
        """The answer, with the right nonce where it says so."""
        if operation == "tests":
            self._nonce = request[0]
            return [1, self._nonce, "ready", ""]
        return [1, *(self._nonce if part == "NONCE" else part for part in self._answer)]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (("NONCE", "passed", ""), "forbidden"),
        (("guess", "passed", ""), "forbidden"),
        (("NONCE", "tampered", "builtins.len was changed"), "forbidden"),
        (("NONCE", "missing", ""), "forbidden"),
        (("NONCE", "splendid", ""), "forbidden"),
        (("NONCE", 1, ""), "forbidden"),
        (("NONCE",), "forbidden"),
        (("NONCE", "failed", "1 != 2"), "wrong"),
        (("NONCE", "error", "KeyError"), "exception"),
    ],
)
def test_no_single_answer_earns_a_pass(answer: tuple[object, ...], verdict: str) -> None:
    """R-083: a process that says the same of every test is found out."""
    job = {"tests": SOURCE, "preamble": "", "setup": "", "seed": "", "entry_point": "", "exports": ["double"]}
    with pytest.raises(Failed) as raised:
        run_inside(job, Answers(*answer))  # type: ignore[arg-type]
    assert raised.value.verdict == verdict
