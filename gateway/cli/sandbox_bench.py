"""How fast the sandbox is, as its callers see it: every figure includes the way through the gateway."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any

from smelt.sandbox.v1 import sandbox_pb2

from smeltkit import limits
from smeltkit.errors import InternalError

if TYPE_CHECKING:
    from gateway.cli.session import Session


async def measure_starts(session: Session, count: int) -> dict[str, float]:
    """Round trips of `count` empty programs, one after the other, in milliseconds."""
    request, trips_ms = sandbox_pb2.ExecuteRequest(code=b"x = 1\n"), []
    for _ in range(count):
        start_s = time.perf_counter()
        reply = await session.call(session.sandbox.Execute, request, timeout_s=limits.EXECUTE_TIMEOUT_S)
        trips_ms.append((time.perf_counter() - start_s) * 1000)
        _must_pass(reply.record)
    return {"round_trip_ms_p50": statistics.median(trips_ms), "round_trip_ms_p95": _high(trips_ms)}


async def measure_verdicts(session: Session, count: int, *, side_by_side: int) -> dict[str, float]:
    """Verdicts a second on a one-line function with two assertions, and the time of one inside the sandbox."""
    candidate = sandbox_pb2.Candidate(
        code=b"def f(n): return n + 1\n",
        form=sandbox_pb2.FORM_ASSERTS,
        tests="assert f(1) == 2\nassert f(2) == 3",
        exports=["f"],
    )
    room = asyncio.Semaphore(side_by_side)

    async def judge() -> Any:
        async with room:
            request = sandbox_pb2.JudgeRequest(candidate=candidate)
            return (await session.call(session.sandbox.Judge, request, timeout_s=limits.EXECUTE_TIMEOUT_S)).record

    start_s = time.perf_counter()
    records = await asyncio.gather(*(judge() for _ in range(count)))
    elapsed_s = time.perf_counter() - start_s
    for record in records:
        _must_pass(record)
    walls_ms = [record.wall_s * 1000 for record in records]
    return {
        "verdicts_per_second": count / elapsed_s,
        "verdict_ms_p50": statistics.median(walls_ms),
        "verdict_ms_p95": _high(walls_ms),
    }


def _must_pass(record: sandbox_pb2.Record) -> None:
    if record.verdict != sandbox_pb2.VERDICT_PASSED:
        verdict = sandbox_pb2.Verdict.Name(record.verdict)
        raise InternalError(f"the sandbox gives {verdict} to a sound program: {record.detail}; see its log")


def _high(values: list[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]
