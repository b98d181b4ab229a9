"""Honest candidates are told what they earned: nothing of the sandbox's own, and nothing of a neighbour's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_service import REPOSITORY, Service, answers_to, judge_all, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

TIMEOUT_S = 60
DOUBLE = b"def double(n):\n    return 2 * n\n"
CASES = """
import unittest
class Doubles(unittest.TestCase):
    def test_four(self):
        self.assertEqual(double(4), 8)
    def test_lists(self):
        self.assertEqual([double(n) for n in range(30)], [2 * n for n in range(30)])
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with sandbox_service(slots="1") as running:
        yield running


def _candidate(code: bytes = DOUBLE, **fields: object) -> pb.Candidate:
    values: dict[str, object] = {"form": pb.FORM_ASSERTS, "tests": "assert double(4) == 8", "exports": ["double"]}
    return pb.Candidate(code=code, **{**values, **fields})  # type: ignore[arg-type]


def _judge(service: Service, candidate: pb.Candidate) -> pb.Record:
    return service.stub.Judge(pb.JudgeRequest(candidate=candidate), timeout=TIMEOUT_S).record


@pytest.mark.parametrize("statement", ["1/0", "import not_installed", "raise ValueError('no')", "def f(): f()\nf()"])
def test_an_exception_while_loading_is_the_same_inside_and_outside(service: Service, statement: str) -> None:
    """R-082: an ordinary failure of a candidate is neither an attack nor ours."""
    found = [
        _judge(service, _candidate(statement.encode() + b"\n" + DOUBLE, form=pb.FORM_UNITTEST, tests=CASES, mode=mode))
        for mode in (pb.MODE_SPLIT, pb.MODE_INSIDE)
    ]
    assert [(record.verdict, record.attempts) for record in found] == [(pb.VERDICT_EXCEPTION, 1)] * 2
    assert found[0].detail == found[1].detail


@pytest.mark.parametrize("wrong", [b"3 * n", b"'xyz'", b"[n, n]"])
def test_a_test_inside_tells_the_assertion_not_the_end_of_its_difference(service: Service, wrong: bytes) -> None:
    code = DOUBLE.replace(b"2 * n", wrong)
    record = _judge(service, _candidate(code, form=pb.FORM_UNITTEST, tests=CASES, mode=pb.MODE_INSIDE))
    assert record.verdict == pb.VERDICT_WRONG
    assert "AssertionError: " in record.detail


def test_few_processes_bind_a_candidate_and_nobody_after_it(service: Service) -> None:
    """R-082: neighbours change no verdict."""
    threads = b"import threading\ndef double(n):\n    threading.Thread(target=print).start()\n    return 2 * n\n"
    candidates = {
        str(number): _candidate(limits=pb.Limits(pids=1 + number // 2 % 3) if number % 2 else None)
        for number in range(24)
    }
    records = judge_all(service.stub, {**candidates, "threads": _candidate(threads)}, timeout_s=TIMEOUT_S)
    assert {(record.verdict, record.attempts) for record in records.values()} == {(pb.VERDICT_PASSED, 1)}
    assert _judge(service, _candidate(threads, limits=pb.Limits(pids=1))).verdict == pb.VERDICT_EXCEPTION
    assert _judge(service, _candidate(threads, limits=pb.Limits(pids=2))).verdict == pb.VERDICT_PASSED


@pytest.mark.parametrize(("end", "status"), [(b"exit()", 0), (b"quit(0)", 0), (b"exit(3)", 3), (b"quit('bye')", 1)])
def test_programs_may_end_as_the_interpreter_teaches(service: Service, end: bytes, status: int) -> None:
    answer = service.stub.Execute(pb.ExecuteRequest(code=b"print(3)\n" + end + b"\n"), timeout=TIMEOUT_S)
    assert (answer.stdout, answer.record.exit_status) == (b"3\n", status)


def test_a_candidate_of_any_length_has_a_verdict(service: Service) -> None:
    long = _candidate(DOUBLE + b"#" * (1 << 20))
    records = judge_all(service.stub, {"long": long, "other": _candidate()}, timeout_s=TIMEOUT_S)
    assert records["long"].verdict == pb.VERDICT_OUTPUT_LIMIT
    assert records["other"].verdict == pb.VERDICT_PASSED
    assert records["long"].judge_digest == records["other"].judge_digest


def test_a_candidate_that_cannot_be_judged_is_refused_alone(service: Service) -> None:
    """Its own answer says why and what to do; those before, beside and after it in the stream have their verdicts."""
    refused = {
        "first": _candidate(exports=["no name"]),
        "tests": _candidate(tests="assert double("),
        "level": _candidate(min_level="guest-kernel"),
        "seed": _candidate(form=pb.FORM_CALLS, tests="((4,), 8)", entry_point="double", exports=[], seed="1"),
    }
    sound = {str(number): _candidate() for number in range(40)}
    answers = answers_to(service.stub, {**refused, **sound}, timeout_s=TIMEOUT_S)
    assert {id: answers[id].refusal.reason for id in refused} == {
        "first": "BAD_CODE",
        "tests": "BAD_CODE",
        "level": "ISOLATION_TOO_WEAK",
        "seed": "UNSUPPORTED_OPTION",
    }
    assert answers["first"].refusal.message == "entry_point and exports are identifiers; 'no name' is none"
    assert answers["level"].refusal.details["required"] == "guest-kernel" and not answers["level"].HasField("record")
    assert {answers[id].record.verdict for id in sound} == {pb.VERDICT_PASSED}


def test_calls_are_counted_or_said_to_be_unknown(service: Service) -> None:
    """Never a zero that was not counted: a judge that waited for the candidate knows it, one at work does not."""
    stuck = b"def double(n):\n    while n == 3: pass\n    return 2 * n\n"
    tests = "assert double(1) == 2\nassert double(3) == 6"
    short = pb.Limits(cpu_s=0.2, wall_s=1)
    found = {
        "passed": _candidate(tests=tests),
        "cpu": _candidate(stuck, tests=tests, limits=short),
        "wall": _candidate(stuck.replace(b"pass", b"__import__('time').sleep(1)"), tests=tests, limits=short),
        "tests": _candidate(tests="double(1)\nwhile True: pass", limits=short),
        "syntax": _candidate(b"def"),
        "inside": _candidate(form=pb.FORM_UNITTEST, tests=CASES, mode=pb.MODE_INSIDE),
        "program": pb.Candidate(code=b"print(1)", form=pb.FORM_STDIO, expected_stdout=b"1"),
    }
    records = judge_all(service.stub, found, timeout_s=TIMEOUT_S)
    assert {id: (record.calls, record.is_uncounted) for id, record in records.items()} == {
        "passed": (2, False),
        "cpu": (2, False),
        "wall": (2, False),
        "tests": (0, True),
        "syntax": (0, False),
        "inside": (0, True),
        "program": (0, True),
    }
    assert (records["cpu"].verdict, records["wall"].verdict) == (pb.VERDICT_TIMEOUT_CPU, pb.VERDICT_TIMEOUT_WALL)


def test_the_guide_for_clients_runs_as_it_stands(service: Service, tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    (text,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "sandbox.md").read_text(), re.DOTALL)
    program.write_text(text)
    command = [sys.executable, str(program), service.address]
    lines = subprocess.check_output(command, text=True, timeout=TIMEOUT_S).splitlines()
    assert lines[0] == "VERDICT_PASSED after 2 calls"
    assert sorted(line.split()[:2] for line in lines[1:]) == [
        ["endless", "VERDICT_TIMEOUT_CPU:"],
        ["right", "VERDICT_PASSED:"],
        ["unusable", "BAD_CODE:"],
        ["wrong", "VERDICT_WRONG:"],
    ]


def test_tests_of_another_form_are_told_what_they_look_like(service: Service) -> None:
    record = _judge(service, _candidate(tests=CASES))
    assert record.detail.endswith("they define test cases: is their form `unittest`?")
