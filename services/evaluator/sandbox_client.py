"""The sandbox as the harness sees it: one stream of candidates and verdicts, opened again when it breaks.

The stream lets the sandbox bound what it takes and reuse its judges; verdicts come in any order and are matched by id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, Final

import grpc
from smelt.sandbox.v1 import sandbox_pb2 as pb
from smelt.sandbox.v1 import sandbox_pb2_grpc

from services.evaluator.ports import Candidate, JudgeInfo, Verdict
from smeltkit import limits
from smeltkit.errors import BadRequest, ServiceUnavailable, SmeltError, Timeout, all_errors
from smeltkit.rpc.channel import call, stream

_MESSAGE_BYTES: Final = 64 * limits.KIB
"""A message with several candidates is closed at this size."""
_FORMS: Final = {"check": pb.FORM_CHECK, "asserts": pb.FORM_ASSERTS, "unittest": pb.FORM_UNITTEST}


class SandboxClient:
    """Speaks to SandboxService over `channel`, which whoever opened it closes. Use it as an async context manager."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = sandbox_pb2_grpc.SandboxServiceStub(channel)
        self._batch: _Batch | None = None

    async def __aenter__(self) -> SandboxClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._batch is not None:
            await self._batch.close()

    async def describe(self) -> JudgeInfo:
        """Which judge this is, and how many candidates it runs at once."""
        reply = await call(self._stub.Describe, pb.DescribeRequest(), timeout_s=limits.CALL_TIMEOUT_DEFAULT_S)
        return JudgeInfo(
            digest=reply.judge_digest,
            level=reply.level,
            slots=reply.slots,
            cpu=reply.cpu,
            profiles=dict(reply.profile_digests),
        )

    async def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one candidate. Its deadline covers two runs and a full queue before them."""
        if self._batch is None or self._batch.is_broken:
            self._batch = _Batch(self._stub)
        timeout_s = limits.EVALUATION_VERDICT_EXTRA_S + 2 * candidate.limits.wall_s
        return _to_verdict(await self._batch.judge(to_message(candidate), timeout_s))


class _Batch:
    """One JudgeBatch stream. When it ends, whatever waits for a verdict gets the error that ended it."""

    def __init__(self, stub: Any) -> None:
        self._candidates: asyncio.Queue[pb.BatchCandidate] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[pb.Record]] = {}
        self._ids = count()
        self._task = asyncio.create_task(self._run(stub))

    @property
    def is_broken(self) -> bool:
        """Whether the stream has ended."""
        return self._task.done()

    async def judge(self, candidate: pb.Candidate, timeout_s: float) -> pb.Record:
        """The record of one candidate."""
        id = str(next(self._ids))
        self._waiting[id] = asyncio.get_running_loop().create_future()
        self._candidates.put_nowait(pb.BatchCandidate(id=id, candidate=candidate))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._waiting[id]
        except TimeoutError as error:
            raise Timeout(f"the sandbox gave no verdict within {timeout_s:.0f} s; see its log") from error
        finally:
            del self._waiting[id]

    async def close(self) -> None:
        """Ends the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, stub: Any) -> None:
        failure: SmeltError = ServiceUnavailable("the sandbox ended the stream of verdicts; try again")
        try:
            async with stream(stub.JudgeBatch, self._outgoing(), timeout_s=limits.CALL_TIMEOUT_MAX_S) as replies:
                async for reply in replies:
                    for one in (reply, *reply.more):
                        waiting = self._waiting.get(one.id)
                        if waiting is None or waiting.done():
                            continue
                        if one.HasField("refusal"):
                            waiting.set_exception(_to_error(one.refusal))
                        else:
                            waiting.set_result(one.record)
        except SmeltError as error:
            failure = error
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(failure)

    async def _outgoing(self) -> AsyncIterator[pb.JudgeBatchRequest]:
        """What waits, together in one message as far as that stays small."""
        while True:
            first = await self._candidates.get()
            request = pb.JudgeBatchRequest(id=first.id, candidate=first.candidate)
            while not self._candidates.empty() and request.ByteSize() < _MESSAGE_BYTES:
                request.more.append(self._candidates.get_nowait())
            yield request


def to_message(candidate: Candidate) -> pb.Candidate:
    """The candidate as the sandbox takes it."""
    return pb.Candidate(
        code=candidate.program.encode(),
        form=_FORMS[candidate.form],
        tests=candidate.tests,
        preamble=candidate.preamble,
        setup=candidate.setup,
        entry_point=candidate.entry_point,
        exports=candidate.exports,
        limits=pb.Limits(cpu_s=candidate.limits.cpu_s, wall_s=candidate.limits.wall_s),
        rerun=candidate.is_rerun_near_limit,
        seed=candidate.seed,
        profile=candidate.profile,
    )


def _to_error(refusal: pb.Refusal) -> SmeltError:
    """What a failed call with this reason would have raised."""
    return all_errors().get(refusal.reason, BadRequest)(refusal.message, details=dict(refusal.details))


def _to_verdict(record: pb.Record) -> Verdict:
    return Verdict(
        verdict=pb.Verdict.Name(record.verdict).removeprefix("VERDICT_").lower().replace("_", "-"),
        detail=record.detail,
        cpu_s=record.cpu_s,
        facts={
            "wall_s": record.wall_s,
            "judge_s": record.judge_s,
            "peak_bytes": record.peak_bytes,
            "calls": None if record.is_uncounted else record.calls,
            "mode": pb.Mode.Name(record.mode).removeprefix("MODE_").lower(),
            "level": record.level,
            "attempts": record.attempts,
            "signal": record.signal,
            "profile": record.profile_digest,
        },
    )
