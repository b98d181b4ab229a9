"""What candidates of each profile may do on the running service, and what is sealed all the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from bigcodebench_rows import BIGCODEBENCH_ROWS
from sandbox_service import Service, children_of, packages_folder, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

from services.evaluator.ports import Limits
from services.evaluator.problems import load_problems
from services.evaluator.references import candidate_of
from services.evaluator.sandbox_client import to_message
from services.evaluator.suites import Data, find_suite
from smeltkit.ids import digest_bytes

TIMEOUT_S = 60
DOUBLE = b"def double(n):\n    return 2 * n\n"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with (
        packages_folder("numpy") as packages,
        sandbox_service(slots="2", science_packages=packages, science_preload="numpy") as running,
    ):
        yield running


def _judge(service: Service, candidate: pb.Candidate) -> pb.Record:
    return service.stub.Judge(pb.JudgeRequest(candidate=candidate), timeout=TIMEOUT_S).record


def test_profile_with_packages_serves_tests_that_import_them(service: Service) -> None:
    tests = (
        "import unittest\nimport numpy as np\n"
        "class T(unittest.TestCase):\n"
        "    def test_array(self):\n        self.assertTrue(np.array_equal(double(np.arange(3)), [0, 2, 4]))\n"
    )
    candidate = pb.Candidate(code=DOUBLE, form=pb.FORM_UNITTEST, tests=tests, exports=["double"], profile="science")
    record = _judge(service, candidate)
    assert (record.verdict, record.mode) == (pb.VERDICT_PASSED, pb.MODE_INSIDE)
    candidate.code = b"def double(n): return n"
    assert _judge(service, candidate).verdict == pb.VERDICT_WRONG
    candidate.profile = "bare"
    with pytest.raises(grpc.RpcError, match="which the profile bare has not"):
        _judge(service, candidate)
    plain = pb.Candidate(code=DOUBLE, form=pb.FORM_ASSERTS, tests="assert double(4) == 8", exports=["double"])
    assert _judge(service, plain).profile_digest != record.profile_digest
    code = b"import numpy; print(numpy.arange(3).sum())"
    answer = service.stub.Execute(pb.ExecuteRequest(code=code, profile="science"), timeout=TIMEOUT_S)
    assert answer.stdout == b"3\n"


def test_only_the_profile_with_packages_starts_its_interpreter_and_it_stays_jailed(service: Service) -> None:
    """R-084: what a candidate starts is sealed as the candidate is."""
    inner = (
        "import numpy, os, socket\n"
        "for attempt in (lambda: open('/etc/passwd'), lambda: socket.socket(), lambda: os.listdir('/proc/1')):\n"
        "    try:\n        print(attempt())\n    except OSError as error:\n        print(type(error).__name__)\n"
    )
    code = (
        "import os, shutil, subprocess, sys\n"
        f"print(subprocess.run([sys.executable, '-c', {inner!r}], capture_output=True, text=True))\n"
        "shutil.copy(sys.executable, '/tmp/copy')\n"
        "os.chmod('/tmp/copy', 0o755)\n"
        "subprocess.run(['/tmp/copy', '-c', 'pass'])\n"
    )
    answer = service.stub.Execute(pb.ExecuteRequest(code=code.encode(), profile="science"), timeout=TIMEOUT_S)
    assert b"stdout='FileNotFoundError\\nPermissionError\\nFileNotFoundError\\n'" in answer.stdout
    assert b"PermissionError" in answer.stderr and answer.record.verdict == pb.VERDICT_EXCEPTION
    answer = service.stub.Execute(pb.ExecuteRequest(code=code.encode()), timeout=TIMEOUT_S)
    assert (answer.stdout, answer.record.verdict) == (b"", pb.VERDICT_EXCEPTION)


def test_references_of_bigcodebench_rows_pass_and_others_do_not(service: Service, tmp_path: Path) -> None:
    """Packages and patches run in the candidate's process, plain test cases outside of it."""
    data = "".join(json.dumps(row) + "\n" for row in BIGCODEBENCH_ROWS).encode()
    suite = dataclasses.replace(
        find_suite("humaneval"), first=0, last=2, problems=3, form="unittest", profile="science", data=_data_of(data)
    )
    modes = []
    for problem in load_problems(suite, data):
        bounds = Limits(cpu_s=10, wall_s=TIMEOUT_S)
        for program, verdict in (
            (problem.reference, pb.VERDICT_PASSED),
            (f"{problem.prompt}\n    return 7\n", pb.VERDICT_WRONG),
        ):
            record = _judge(service, to_message(candidate_of(problem, program, bounds)))
            assert record.verdict == verdict, record.detail
        modes.append(record.mode)
    assert modes == [pb.MODE_INSIDE, pb.MODE_INSIDE, pb.MODE_SPLIT]


def _data_of(data: bytes) -> Data:
    facts = {"file": "rows.jsonl", "url": "https://example.org/rows.jsonl", "licence": "Apache-2.0"}
    return Data(**facts, digest=digest_bytes(data), rows=len(BIGCODEBENCH_ROWS), format="bigcodebench")


def test_candidate_holds_no_capability_and_cannot_be_traced(service: Service) -> None:
    """R-084: seen from outside, while it runs; the same for the judge that waits beside it."""
    with ThreadPoolExecutor(1) as pool:
        code = b"import time\nprint('here', flush=True)\ntime.sleep(1)\n"
        answer = pool.submit(lambda: service.stub.Execute(pb.ExecuteRequest(code=code), timeout=TIMEOUT_S))
        time.sleep(0.5)
        found = [facts for pid in _descendants(service.pid) if (facts := _facts_of(pid))]
    sealed = [facts for facts in found if len(facts["NSpid"].split()) == 3]
    assert len(sealed) > 2 and b"here" in answer.result().stdout
    for facts in sealed:
        assert [facts[name] for name in ("CapPrm", "CapEff", "CapAmb", "CapBnd")] == ["0" * 16] * 4
        assert (facts["NoNewPrivs"], facts["Seccomp"], facts["owner"]) == ("1", "2", "0")
        assert "0" not in facts["Uid"].split()


def _descendants(pid: int) -> list[int]:
    below = children_of(pid)
    return below + [inner for child in below for inner in _descendants(child)]


def _facts_of(pid: int) -> dict[str, str]:
    """What the kernel says of the process; its files belong to root if it cannot be traced."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return {**facts, "owner": str(os.stat(f"/proc/{pid}/status").st_uid)}
    return {}
