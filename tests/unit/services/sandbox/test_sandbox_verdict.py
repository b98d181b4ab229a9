"""The verdict that evidence gives: the first line of the table that applies."""

from __future__ import annotations

import signal

import pytest

from services.sandbox.policy import Limits
from services.sandbox.verdict import Evidence, Record, Stop, Verdict, decide, escaped, from_wire, to_wire

LIMITS = Limits(cpu_s=2.0, output_bytes=1024)
KILLED = int(signal.SIGKILL)


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ({"said": "passed"}, Verdict.PASSED),
        ({"said": "passed", "output_bytes": 1025}, Verdict.OUTPUT_LIMIT),
        ({"said": "passed", "was_oom_killed": True}, Verdict.PASSED),
        ({"said": "passed", "stop": Stop.CANCELLED}, Verdict.INFRA),
        ({"said": "no-code", "output_bytes": 1025}, Verdict.NO_CODE),
        ({"said": "lost", "was_oom_killed": True, "status": KILLED}, Verdict.MEMORY),
        ({"said": "", "stop": Stop.MEMORY}, Verdict.MEMORY),
        ({"said": "memory"}, Verdict.MEMORY),
        ({"said": "lost", "status": int(signal.SIGSYS)}, Verdict.FORBIDDEN),
        ({"said": "forbidden"}, Verdict.FORBIDDEN),
        ({"said": "forbidden", "cpu_s": 2.5}, Verdict.FORBIDDEN),
        ({"said": "lost", "cpu_s": 2.5, "status": int(signal.SIGXCPU)}, Verdict.TIMEOUT_CPU),
        ({"said": "", "stop": Stop.CPU}, Verdict.TIMEOUT_CPU),
        ({"said": "", "stop": Stop.JUDGE_CPU}, Verdict.TIMEOUT_CPU),
        ({"said": "", "stop": Stop.WALL}, Verdict.TIMEOUT_WALL),
        ({"said": "syntax"}, Verdict.SYNTAX),
        ({"said": "exception"}, Verdict.EXCEPTION),
        ({"said": "lost", "status": 0}, Verdict.EXCEPTION),
        ({"said": "lost", "status": 3 << 8}, Verdict.EXCEPTION),
        ({"said": "wrong"}, Verdict.WRONG),
        ({"said": "", "judge_died": True}, Verdict.INFRA),
        ({"said": "anything else"}, Verdict.INFRA),
    ],
)
def test_first_line_that_applies_decides(evidence: dict[str, object], verdict: Verdict) -> None:
    assert decide(Evidence(limits=LIMITS, **evidence))[0] is verdict  # type: ignore[arg-type]


def test_status_zero_is_never_a_pass() -> None:
    """R-082: without the judge's word no exit status earns anything."""
    assert decide(Evidence(limits=LIMITS, said="lost", status=0))[0] is Verdict.EXCEPTION


def test_detail_is_one_printable_bounded_line() -> None:
    text = escaped("a\nb\x1b[31m\ud800" + "x" * 1000)
    assert text.startswith("a\\nb\\x1b[31m\\ud800") and len(text) == 500 and text.isprintable()


def test_record_survives_the_way_to_the_service() -> None:
    record = Record(verdict=Verdict.WRONG, stdout=b"\xff\x00", stderr=b"e", exit_status=None, limits=LIMITS)
    assert from_wire(to_wire(record), record.limits) == record
