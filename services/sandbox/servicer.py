"""The sandbox's calls, translated: request to job, record to answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from smelt.sandbox.v1 import sandbox_pb2 as pb
from smelt.sandbox.v1 import sandbox_pb2_grpc

from services.sandbox.admission import check_level
from services.sandbox.batch import judge_all
from services.sandbox.interpreter import judge_digest
from services.sandbox.messages import (
    from_batch_records,
    from_error,
    from_limits,
    from_record,
    from_record_and_streams,
    to_judge_job,
    to_layers,
    to_program_job,
)
from services.sandbox.node import cpu_model
from services.sandbox.policy import Limits
from services.sandbox.repeats import Repeats
from services.sandbox.sandbox import Sandbox
from services.sandbox.verdict import Record, Verdict
from smeltkit import telemetry
from smeltkit.errors import SmeltError
from smeltkit.ids import new_id
from smeltkit.rpc.context import RpcContext
from smeltkit.telemetry import names

_Asked = pb.JudgeBatchRequest | pb.BatchCandidate


class SandboxServicer(sandbox_pb2_grpc.SandboxServiceServicer):
    """Serves one sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._repeats = Repeats()

    async def Execute(self, request: pb.ExecuteRequest, context: RpcContext) -> pb.ExecuteResponse:
        """Runs a program; an outcome, no verdict on correctness."""
        record = await self._sandbox.pool.run(to_program_job(request, self._sandbox.profiles))
        return pb.ExecuteResponse(**from_record_and_streams(record))

    async def Judge(self, request: pb.JudgeRequest, context: RpcContext) -> pb.JudgeResponse:
        """Judges one candidate, in a judge process of its own."""
        record = await self._judge(request.candidate, judge_key="", can_wait=False)
        return pb.JudgeResponse(record=from_record(record))

    async def JudgeBatch(
        self, request_iterator: AsyncIterator[pb.JudgeBatchRequest], context: RpcContext
    ) -> AsyncIterator[pb.JudgeBatchResponse]:
        """Judges many; answers in order of completion, together for who asks together, a refusal for what cannot be
        judged. The stream's flow control is the back-pressure."""
        key = new_id("batch")

        async def judge(asked: _Asked) -> pb.BatchRecord:
            try:
                record = await self._judge(asked.candidate, judge_key=key, can_wait=True)
            except SmeltError as error:
                return pb.BatchRecord(id=asked.id, refusal=from_error(error))
            return pb.BatchRecord(id=asked.id, record=from_record(record))

        groups = (_together(request) async for request in request_iterator)
        async for first, *more in judge_all(groups, judge, parallel=2 * self._sandbox.pool.slots):
            yield from_batch_records(first, more)

    async def Describe(self, request: pb.DescribeRequest, context: RpcContext) -> pb.DescribeResponse:
        """Isolation level, layers, profiles and bounds."""
        return pb.DescribeResponse(
            level=str(self._sandbox.level),
            required_level=self._sandbox.config.level,
            layers=to_layers(self._sandbox.isolation),
            profiles=self._sandbox.profiles,
            default_limits=from_limits(Limits()),
            slots=self._sandbox.pool.slots,
            judge_digest=await asyncio.to_thread(judge_digest),
            cpu=cpu_model(),
            profile_digests=self._sandbox.pool.profile_digests,
        )

    async def _judge(self, candidate: pb.Candidate, *, judge_key: str, can_wait: bool) -> Record:
        check_level(candidate.min_level, self._sandbox.level)
        job = to_judge_job(candidate, judge_key, self._sandbox.profiles)
        record = await self._repeats.once(
            candidate.request_id,
            _digest(candidate) if candidate.request_id else b"",
            lambda: self._sandbox.pool.run(job, rerun=candidate.rerun, can_wait=can_wait),
        )
        decided = {names.VERDICT: str(record.verdict)}
        telemetry.counter(names.VERDICTS).add(1, decided)
        if record.verdict is not Verdict.PASSED:
            telemetry.event("smelt.sandbox.judge", **decided, **{names.SANDBOX_LEVEL: record.level})
        return record


def _together(request: pb.JudgeBatchRequest) -> list[_Asked]:
    return [request, *request.more]


def _digest(candidate: pb.Candidate) -> bytes:
    return hashlib.sha256(candidate.SerializeToString(deterministic=True)).digest()
