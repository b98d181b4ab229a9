"""Tests written as a unittest module, run in the judge against stand-ins for the candidate's names."""

from __future__ import annotations

import types
import unittest
from typing import Any

from services.sandbox.judge.outcome import Failed, Refused


class FirstFailure(unittest.TestResult):
    """Keeps the first exception itself instead of its text, and stops there."""

    error: BaseException | None = None

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        """An exception, the candidate's or the test's own."""
        self.error = self.error or err[1]
        self.stop()

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        """An assertion that does not hold."""
        self.addError(test, err)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        """The end of a subtest; `err` is None if it passed."""
        if err is not None:
            self.addError(subtest, err)


def run_unittest(namespace: dict[str, Any]) -> None:
    """Runs every test case in `namespace`; raises the first failure, Failed if one is skipped or expected to fail."""
    module = types.ModuleType("tests")
    module.__dict__.update(namespace)
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    if suite.countTestCases() == 0:
        raise Refused("the tests define no unittest case")
    result = FirstFailure()
    suite.run(result)
    if result.error is not None:
        raise result.error
    if not result.wasSuccessful() or result.skipped or result.expectedFailures:
        raise Failed("wrong", "a test was skipped, or failed as expected")
