"""Reference solutions through the whole service: all pass, also when neighbours load every core."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from sandbox_service import Service, humaneval_references, judge_all, mbpp_references, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

NEIGHBOURS = 8
TIMEOUT_S = 280


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with sandbox_service() as running:
        yield running


@pytest.fixture
def neighbours() -> Iterator[None]:
    """Processes that never stop computing."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(NEIGHBOURS)]
    yield
    for process in busy:
        process.kill()
        process.wait()


def _failed(records: dict[str, pb.Record]) -> dict[str, str]:
    return {
        name: f"{pb.Verdict.Name(record.verdict)} {record.detail}"
        for name, record in records.items()
        if record.verdict != pb.VERDICT_PASSED
    }


def test_every_humaneval_reference_passes(service: Service) -> None:
    """R-085: 164 of 164 on an idle node."""
    records = judge_all(service.stub, humaneval_references(), timeout_s=TIMEOUT_S)
    assert (len(records), _failed(records)) == (164, {})


def test_every_mbpp_reference_passes_with_eight_busy_neighbours(service: Service, neighbours: None) -> None:
    """R-085: 500 of 500 while 8 processes load the machine; the limit is CPU time, not the clock on the wall."""
    records = judge_all(service.stub, mbpp_references(), timeout_s=TIMEOUT_S)
    assert (len(records), _failed(records)) == (500, {})


def test_every_humaneval_reference_passes_with_eight_busy_neighbours(service: Service, neighbours: None) -> None:
    """R-085: neighbours change no verdict."""
    records = judge_all(service.stub, humaneval_references(), timeout_s=TIMEOUT_S)
    assert (len(records), _failed(records)) == (164, {})


@pytest.mark.parametrize("completion", ["    import os; os._exit(0)\n", "    raise SystemExit(0)\n"])
def test_an_exit_solves_no_task(service: Service, completion: str) -> None:
    """R-082: an exit in place of every solution scores 0 of 164."""
    records = judge_all(service.stub, _completed(completion), timeout_s=TIMEOUT_S)
    assert {record.verdict for record in records.values()} == {pb.VERDICT_EXCEPTION}


def test_an_always_equal_object_solves_no_task(service: Service) -> None:
    """R-083: an object that equals everything scores 0 of 164."""
    code = "    class Equal(int):\n        __eq__ = lambda self, other: True\n    return Equal()\n"
    records = judge_all(service.stub, _completed(code), timeout_s=TIMEOUT_S)
    assert pb.VERDICT_PASSED not in {record.verdict for record in records.values()}


def _completed(body: str) -> dict[str, pb.Candidate]:
    """Every task with `body` as the body of its function."""
    candidates = humaneval_references()
    for candidate in candidates.values():
        candidate.code = f"def {candidate.entry_point}(*args):\n{body}".encode()
    return candidates
