"""Honest candidates are told what they earned: nothing of the sandbox's own, and nothing of a neighbour's."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from sandbox_service import Service, judge_all, sandbox_service
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


def test_a_candidate_of_any_length_has_a_verdict_and_a_wrong_request_names_its_id(service: Service) -> None:
    long = _candidate(DOUBLE + b"#" * (1 << 20))
    records = judge_all(service.stub, {"long": long, "other": _candidate()}, timeout_s=TIMEOUT_S)
    assert records["long"].verdict == pb.VERDICT_OUTPUT_LIMIT
    assert records["other"].verdict == pb.VERDICT_PASSED
    assert records["long"].judge_digest == records["other"].judge_digest
    with pytest.raises(grpc.RpcError) as refused:
        judge_all(service.stub, {"a": _candidate(), "b": _candidate(exports=["no name"])}, timeout_s=TIMEOUT_S)
    assert refused.value.details() == "candidate 'b': entry_point and exports are identifiers; 'no name' is none"


def test_tests_of_another_form_are_told_what_they_look_like(service: Service) -> None:
    record = _judge(service, _candidate(tests=CASES))
    assert record.detail.endswith("they define test cases: is their form `unittest`?")
