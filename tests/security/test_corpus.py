"""The corpus of hostile candidates: each case gets its expected verdict, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from corpus_run import Case, load_cases

RUNNER = Path(__file__).with_name("corpus_run.py")
LEVELS = ("jail", "rootless", "confined") if os.geteuid() == 0 else ("rootless", "confined")
CASES = {case.name: case for case in load_cases()}
TIMEOUT_S = 280

Outcomes = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="session")
def outcomes() -> Iterator[Mapping[str, Outcomes]]:
    """Level to outcome by case; all levels run side by side, those below jail as an ordinary user."""
    command = [sys.executable, str(RUNNER)]
    started = {level: subprocess.Popen([*command, level], stdout=subprocess.PIPE, text=True) for level in LEVELS}
    try:
        yield {level: _read(process) for level, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def _read(process: subprocess.Popen[str]) -> Outcomes:
    text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, "the runner failed; its error is above"
    return {outcome["name"]: outcome for outcome in map(json.loads, text.splitlines())}


def _expected(case: Case, level: str) -> tuple[str, ...]:
    return case.expected_confined if level == "confined" else case.expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_hostile_candidate_gets_its_verdict(outcomes: Mapping[str, Outcomes], name: str, level: str) -> None:
    """R-082, R-083, R-084: no exit, value, output or reach outside earns a pass."""
    found = outcomes[level][name]
    assert found["verdict"] in _expected(CASES[name], level), found["detail"]


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_left_behind(outcomes: Mapping[str, Outcomes], level: str) -> None:
    """R-084: no process, descriptor, file or memory outlives any case, and the slot judges on."""
    assert {name: found["left_behind"] for name, found in outcomes[level].items() if found["left_behind"]} == {}


def test_only_honest_leftovers_may_pass() -> None:
    """R-083: a case whose expected verdict is a pass solves the task and merely leaves something behind."""
    passing = {case.name for case in CASES.values() if "passed" in (*case.expected, *case.expected_confined)}
    assert all(name.endswith(("left-behind", "ignore-signals", "honest")) for name in passing)


def test_corpus_is_large_and_named_once() -> None:
    """R-083: at least 60 cases, no name twice."""
    assert len(CASES) == len(load_cases()) >= 60
