"""Kill -9 of any process of the sandbox while it judges: no verdict is lost, doubled, or held against a candidate."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator

import grpc
from sandbox_service import Service, children_of, sandbox_service
from smelt.sandbox.v1 import sandbox_pb2 as pb

CANDIDATES = 120
KILLS = 12
PAUSE_S = 0.12
TIMEOUT_S = 120
SEED = 5


def _requests(names: list[str]) -> Iterator[pb.JudgeBatchRequest]:
    code = b"import time\ntime.sleep(0.02)\ndef double(n):\n    return 2 * n\n"
    candidate = pb.Candidate(code=code, form=pb.FORM_ASSERTS, tests="assert double(4) == 8", exports=["double"])
    return (pb.JudgeBatchRequest(id=name, candidate=candidate) for name in names)


def _kill_one(service: Service, chance: random.Random) -> None:
    """A supervisor, or a process of one of its zygotes: never a candidate or judge, whose end is their own verdict."""
    supervisors = children_of(service.pid)
    zygotes = [pid for supervisor in supervisors for pid in children_of(supervisor)]
    inner = [pid for zygote in zygotes for pid in children_of(zygote)]
    victims = [*supervisors, *zygotes, *inner]
    with contextlib.suppress(ProcessLookupError):
        if victims:
            os.kill(chance.choice(victims), signal.SIGKILL)


def test_every_verdict_comes_once_while_supervisors_and_zygotes_are_killed() -> None:
    """R-088: what was in flight is tried again elsewhere; what cannot be decided is infra, never a fail."""
    chance, is_over = random.Random(SEED), threading.Event()
    names = [str(number) for number in range(CANDIDATES)]
    with sandbox_service(slots="2") as service:

        def kill() -> None:
            for _ in range(KILLS):
                if not is_over.wait(PAUSE_S):
                    _kill_one(service, chance)

        killer = threading.Thread(target=kill)
        killer.start()
        answers = list(service.stub.JudgeBatch(_requests(names), timeout=TIMEOUT_S))
        is_over.set()
        killer.join()
        assert sorted(answer.id for answer in answers) == sorted(names)
        verdicts = [answer.record.verdict for answer in answers]
        assert set(verdicts) <= {pb.VERDICT_PASSED, pb.VERDICT_INFRA}
        assert verdicts.count(pb.VERDICT_PASSED) > CANDIDATES - KILLS
        assert any(answer.record.attempts == 2 for answer in answers)
        after = list(service.stub.JudgeBatch(_requests(["a", "b"]), timeout=TIMEOUT_S))
        assert [answer.record.verdict for answer in after] == [pb.VERDICT_PASSED] * 2


def test_batch_goes_on_at_another_service_when_one_is_killed() -> None:
    """R-088: answers that came stay; what has none is asked again and comes once."""
    names = [str(number) for number in range(CANDIDATES // 2)]
    found: dict[str, int] = {}
    with sandbox_service(slots="2") as service, contextlib.suppress(grpc.RpcError):
        for answer in service.stub.JudgeBatch(_requests(names), timeout=TIMEOUT_S):
            found[answer.id] = answer.record.verdict
            if len(found) == CANDIDATES // 4:
                os.kill(service.pid, signal.SIGKILL)
    rest = [name for name in names if name not in found]
    assert rest
    with sandbox_service(slots="2") as service:
        answers = list(service.stub.JudgeBatch(_requests(rest), timeout=TIMEOUT_S))
    assert sorted(answer.id for answer in answers) == sorted(rest)
    found.update({answer.id: answer.record.verdict for answer in answers})
    assert found == dict.fromkeys(names, pb.VERDICT_PASSED)
