"""The sandbox's calls on the running service: outcomes, verdicts, streams, refusals, faults."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sandbox_service import REPOSITORY, Service, children_of, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

TIMEOUT_S = 60
DEFAULT_CPU_S = 10
DOUBLE = b"def double(n):\n    return 2 * n\n"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with sandbox_service(slots="2") as running:
        yield running


def _candidate(code: bytes = DOUBLE, tests: str = "assert double(4) == 8", **fields: object) -> pb.Candidate:
    values: dict[str, object] = {"form": pb.FORM_ASSERTS, "exports": ["double"], **fields}
    return pb.Candidate(code=code, tests=tests, **values)  # type: ignore[arg-type]


def _judge(service: Service, candidate: pb.Candidate) -> pb.Record:
    return service.stub.Judge(pb.JudgeRequest(candidate=candidate), timeout=TIMEOUT_S).record


def _reason(call: contextlib.AbstractContextManager[pytest.ExceptionInfo[grpc.RpcError]]) -> str:
    raised = call.value  # type: ignore[attr-defined]
    info = error_details_pb2.ErrorInfo()
    for detail in rpc_status.from_call(raised).details:
        if detail.Unpack(info):
            return info.reason
    return ""


def test_program_gives_its_outcome(service: Service) -> None:
    code = b"import sys\nprint(sys.stdin.read().upper())\nprint('oh', file=sys.stderr)\nsys.exit(3)\n"
    answer = service.stub.Execute(pb.ExecuteRequest(code=code, stdin=b"hello"), timeout=TIMEOUT_S)
    assert (answer.stdout, answer.stderr, answer.record.exit_status) == (b"HELLO\n", b"oh\n", 3)
    assert answer.record.verdict == pb.VERDICT_EXCEPTION


def test_record_says_what_it_rests_on(service: Service) -> None:
    """R-082: level, bounds, costs and digests are on the verdict."""
    record = _judge(service, _candidate())
    assert record.verdict == pb.VERDICT_PASSED
    assert (record.mode, record.calls, record.attempts) == (pb.MODE_SPLIT, 1, 1)
    assert record.cpu_s > 0 and record.wall_s > 0 and record.judge_s > 0
    assert record.level and record.judge_digest.startswith("sha256:") and record.profile_digest.startswith("sha256:")
    assert record.limits.memory_bytes == 512 << 20


@pytest.mark.parametrize(
    ("compare", "expected", "verdict"),
    [
        (pb.COMPARE_TOKENS, b"1   2 3", pb.VERDICT_PASSED),
        (pb.COMPARE_EXACT, b"1 2\n3\n", pb.VERDICT_PASSED),
        (pb.COMPARE_EXACT, b"1 2 3", pb.VERDICT_WRONG),
        (pb.COMPARE_TOKENS, b"1 2", pb.VERDICT_WRONG),
    ],
)
def test_output_is_compared_outside(service: Service, compare: int, expected: bytes, verdict: int) -> None:
    candidate = pb.Candidate(code=b"print(1, 2)\nprint(3)\n", form=pb.FORM_STDIO, expected_stdout=expected)
    candidate.compare = compare  # type: ignore[assignment]
    assert _judge(service, candidate).verdict == verdict


def test_output_that_is_not_compared_comes_back(service: Service) -> None:
    candidate = pb.Candidate(code=b"print(5)\n", form=pb.FORM_STDIO, compare=pb.COMPARE_NONE)
    record = _judge(service, candidate)
    assert (record.verdict, record.stdout_head) == (pb.VERDICT_PASSED, "5\n")


def test_calls_are_judged_as_data(service: Service) -> None:
    fields = {"form": pb.FORM_CALLS, "entry_point": "double", "exports": [], "tolerance": 1e-6}
    assert _judge(service, _candidate(tests="((2,), 4)\n((0.1,), 0.2000000001)", **fields)).calls == 2
    assert _judge(service, _candidate(tests="((2,), 5)", **fields)).verdict == pb.VERDICT_WRONG


def test_same_request_id_gives_the_same_run(service: Service) -> None:
    first, again = (_judge(service, _candidate(request_id="one")) for _ in range(2))
    assert first == again and first != _judge(service, _candidate())
    with pytest.raises(grpc.RpcError) as raised:
        _judge(service, _candidate(request_id="one", tests="assert double(1) == 2"))
    assert _reason(raised) == "REQUEST_ID_REUSED"


def test_right_output_with_a_failing_exit_is_no_pass(service: Service) -> None:
    """R-082: what is printed counts only if the program ends well."""
    candidate = pb.Candidate(code=b"print(7)\nraise SystemExit(1)\n", form=pb.FORM_STDIO, expected_stdout=b"7\n")
    assert _judge(service, candidate).verdict == pb.VERDICT_EXCEPTION


def test_unittest_module_runs_outside_the_candidate(service: Service) -> None:
    tests = (
        "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n        self.assertEqual(double(2), 4)\n"
    )
    assert _judge(service, _candidate(tests=tests, form=pb.FORM_UNITTEST)).verdict == pb.VERDICT_PASSED
    wrong = _judge(service, _candidate(b"def double(n): return n", tests=tests, form=pb.FORM_UNITTEST))
    assert wrong.verdict == pb.VERDICT_WRONG


def test_tests_that_patch_the_candidate_run_in_its_process_twice(service: Service) -> None:
    """R-082: what must run inside says so on the verdict, and a pass is repeated in a new process."""
    tests = (
        "import unittest\nfrom unittest.mock import patch\n"
        "class T(unittest.TestCase):\n"
        "    @patch('candidate.factor', return_value=3)\n"
        "    def test_patched(self, factor):\n        self.assertEqual(double(2), 6)\n"
        "    def test_plain(self):\n        self.assertEqual(double(2), 4)\n"
    )
    code = b"def factor():\n    return %d\ndef double(n):\n    return factor() * n\n"
    right = _judge(service, _candidate(code % 2, tests, form=pb.FORM_UNITTEST))
    assert (right.verdict, right.mode, right.attempts) == (pb.VERDICT_PASSED, pb.MODE_INSIDE, 2)
    assert [run.verdict for run in right.earlier] == [pb.VERDICT_PASSED]
    wrong = _judge(service, _candidate(code % 5, tests, form=pb.FORM_UNITTEST))
    assert (wrong.verdict, wrong.attempts) == (pb.VERDICT_WRONG, 1) and "T.test_plain" in wrong.detail


def test_code_is_bytes(service: Service) -> None:
    """An encoding cookie is the interpreter's business."""
    code = "# -*- coding: latin-1 -*-\ndef double(n):\n    return '\xe9' * n\n".encode("latin-1")
    assert _judge(service, _candidate(code, "assert double(2) == '\\xe9\\xe9'")).verdict == pb.VERDICT_PASSED


def test_tests_that_do_not_compile_are_refused(service: Service) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _judge(service, _candidate(tests="assert double(2 =="))
    assert (raised.value.code(), _reason(raised)) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_CODE")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"limits": pb.Limits(cpu_s=1000)}, "BAD_CODE"),
        ({"limits": pb.Limits(memory_bytes=1)}, "BAD_CODE"),
        ({"mode": pb.MODE_INSIDE}, "UNSUPPORTED_OPTION"),
        ({"profile": "art"}, "UNSUPPORTED_OPTION"),
        ({"form": pb.FORM_UNSPECIFIED}, "BAD_CODE"),
        ({"exports": []}, "BAD_CODE"),
        ({"stdin": b"x"}, "UNSUPPORTED_OPTION"),
        ({"min_level": "perfect"}, "BAD_CONFIG"),
    ],
)
def test_bad_request_is_refused_with_its_reason(service: Service, fields: dict[str, object], reason: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        _judge(service, _candidate(**fields))
    assert (raised.value.code(), _reason(raised)) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_describe_names_level_and_layers(service: Service) -> None:
    answer = service.stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
    layers = {layer.name: layer for layer in answer.layers}
    assert layers["seccomp"].is_present and answer.slots == 2 and answer.profiles == ["bare"]
    assert answer.profile_digests["bare"].startswith("sha256:")
    assert all(layer.is_present or (layer.error and layer.remedy) for layer in answer.layers)


def test_batch_answers_in_order_of_completion(service: Service) -> None:
    slow = _candidate(b"import time\ntime.sleep(1.5)\n" + DOUBLE)
    requests = [pb.JudgeBatchRequest(id="slow", candidate=slow)]
    requests += [pb.JudgeBatchRequest(id=f"fast-{i}", candidate=_candidate()) for i in range(3)]
    answers = list(service.stub.JudgeBatch(iter(requests), timeout=TIMEOUT_S))
    assert [answer.id for answer in answers][-1] == "slow"
    assert {answer.record.verdict for answer in answers} == {pb.VERDICT_PASSED}


def test_candidates_of_one_message_are_each_judged_once(service: Service) -> None:
    """Each verdict comes under its own id, a slow candidate holds back none of the others."""
    slow = pb.BatchCandidate(id="slow", candidate=_candidate(b"import time\ntime.sleep(1.5)\n" + DOUBLE))
    wrong = pb.BatchCandidate(id="wrong", candidate=_candidate(b"def double(n): return n"))
    more = [slow, wrong, *(pb.BatchCandidate(id=str(number), candidate=_candidate()) for number in range(10))]
    request = pb.JudgeBatchRequest(id="first", candidate=_candidate(), more=more)
    answers = list(service.stub.JudgeBatch(iter([request]), timeout=TIMEOUT_S))
    found = [one for answer in answers for one in (answer, *answer.more)]
    assert sorted(one.id for one in found) == sorted(["first", "slow", "wrong", *map(str, range(10))])
    assert [one.id for one in found if one.record.verdict != pb.VERDICT_PASSED] == ["wrong"]
    assert answers[-1].id == "slow" and len(answers) < len(found)


def test_batch_takes_no_more_than_it_can_run(service: Service) -> None:
    """Back-pressure: requests far ahead of the answers stay with the caller."""
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()
    hold = _candidate(b"import time\ntime.sleep(600)\n")
    hold.code += b"#" * (1 << 19)

    def requests() -> Iterator[pb.JudgeBatchRequest]:
        for number in range(200):
            taken.put(number)
            yield pb.JudgeBatchRequest(id=str(number), candidate=hold)

    call = service.stub.JudgeBatch(requests(), timeout=3)
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert taken.qsize() < 100


def test_cancelled_call_frees_its_slots_and_leaves_no_process(service: Service) -> None:
    endless = _candidate(b"import os\nos.fork()\nwhile True: pass\n", limits=pb.Limits(cpu_s=300, wall_s=900))
    calls = [service.stub.Judge.future(pb.JudgeRequest(candidate=endless), timeout=TIMEOUT_S) for _ in range(2)]
    _wait_until(lambda: _busy_processes(service.pid) >= 4)
    for call in calls:
        call.cancel()
    _wait_until(lambda: _busy_processes(service.pid) == 0)
    assert _judge(service, _candidate()).verdict == pb.VERDICT_PASSED


def test_full_queue_is_refused_with_a_time_to_retry() -> None:
    with sandbox_service(slots="1", queue_per_slot="1") as service, ThreadPoolExecutor(8) as threads:
        sleeper = _candidate(b"import time\ntime.sleep(2)\n" + DOUBLE)
        futures = [threads.submit(_judge, service, sleeper) for _ in range(6)]
        errors = [error for future in futures if isinstance(error := future.exception(), grpc.RpcError)]
    assert errors
    assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("victim", ["supervisor", "zygote"])
def test_killed_process_of_a_slot_costs_no_verdict(service: Service, victim: str) -> None:
    """R-088: an infrastructure failure is retried on another slot and never counted against the candidate."""
    slow = _candidate(b"import time\ntime.sleep(1.5)\n" + DOUBLE)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(_judge, service, slow)
        time.sleep(0.5)
        for supervisor in children_of(service.pid):
            if _is_running(supervisor):
                os.kill(supervisor if victim == "supervisor" else children_of(supervisor)[0], signal.SIGKILL)
                break
        record = future.result(timeout=TIMEOUT_S)
    assert (record.verdict, record.attempts) == (pb.VERDICT_PASSED, 2)
    assert [run.verdict for run in record.earlier] == [pb.VERDICT_INFRA]


def test_candidate_that_ends_the_judge_twice_is_forbidden(service: Service) -> None:
    """R-088: nobody can buy a withheld score: the slot judges a sound candidate between the two deaths."""
    record = _judge(service, _candidate(tests="import os\nif double(1) == 2: os._exit(9)\n"))
    assert (record.verdict, record.attempts) == (pb.VERDICT_FORBIDDEN, 2)


def test_fork_bomb_is_bound_without_groups_too() -> None:
    """R-084: a limit of processes binds no host root, so candidates never share the uid of a service that is root."""
    with sandbox_service(slots="1", level="rootless", ceiling="rootless") as service:
        # Its children wait, so that it is the first process itself that meets the bound.
        code = b"import os, time\nwhile os.fork():\n    pass\ntime.sleep(60)\n"
        bomb = pb.ExecuteRequest(code=code, limits=pb.Limits(cpu_s=2, pids=16))
        record = service.stub.Execute(bomb, timeout=TIMEOUT_S).record
        assert (record.verdict, record.level) == (pb.VERDICT_EXCEPTION, "rootless")
        assert "BlockingIOError" in record.detail and record.attempts == 1
        assert _judge(service, _candidate()).verdict == pb.VERDICT_PASSED


def test_service_refuses_to_start_below_its_level() -> None:
    """R-084: too weak an isolation is an error with the remedy, not a weaker verdict."""
    settings = {"SMELT_SANDBOX_LEVEL": "jail", "SMELT_SANDBOX_CEILING": "rootless", "SMELT_RPC_LISTEN": "127.0.0.1:0"}
    command = [sys.executable, "-m", "services.sandbox"]
    ended = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **settings}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ended.returncode != 0
    line = json.loads(ended.stdout.splitlines()[-1])
    assert line["reason"] == "ISOLATION_TOO_WEAK" and "SMELT_SANDBOX_LEVEL" in line["message"]


def test_ended_service_leaves_no_process_and_no_group() -> None:
    with sandbox_service(slots="1") as service:
        tree = [*children_of(service.pid)]
        tree += [pid for child in tree for pid in children_of(child)]
        assert len(tree) >= 3
        os.kill(service.pid, signal.SIGKILL)
        _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in tree))


def _tree(pid: int) -> list[int]:
    return [inner for child in children_of(pid) for inner in (child, *_tree(child))]


def _is_running(supervisor: int) -> bool:
    """Whether the slot runs a candidate: one that waits for its job has no bound of CPU time yet."""
    for pid in _tree(supervisor):
        with contextlib.suppress(OSError):
            if f"Max cpu time              {DEFAULT_CPU_S + 1} " in Path(f"/proc/{pid}/limits").read_text():
                return True
    return False


def _busy_processes(pid: int) -> int:
    """Processes below `pid` that have used more than half a second of CPU."""
    count = 0
    for inner in _tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{inner}/stat").read_text(errors="replace").rpartition(")")[2].split()
            count += int(fields[11]) > os.sysconf("SC_CLK_TCK") // 4 and fields[0] == "R"
    return count


def _wait_until(holds: object) -> None:
    assert callable(holds)
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen in 30 s")
