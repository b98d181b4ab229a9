"""Who may work on a job, and until when: cancels, lost leases, and results of those that held it once."""

from __future__ import annotations

import asyncio

import pytest
from jobs_handler import DIGEST, Toy, queue_is_drained, take_lease_away

from smeltkit.errors import JobCancelled, LeaseLost
from smeltkit.ids import digest_bytes
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.testing.jobs import JobRig
from smeltkit.testing.waiting import eventually


async def test_a_job_cancelled_in_the_queue_never_runs(rig: JobRig) -> None:
    """R-130: what was cancelled is not started."""
    toy = Toy()
    id = (await rig.start("count")).id
    await rig.ledger.cancel(id)
    async with rig.working({"count": toy}):
        await queue_is_drained(rig)
    assert (await rig.ledger.get(id)).state == model.CANCELLED
    assert toy.runs == []


async def test_a_cancel_reaches_the_handler_and_nothing_is_restarted(rig: JobRig) -> None:
    """R-130: the handler is cancelled, the job ends cancelled, its lease is free, and no attempt follows."""
    toy = Toy()
    async with rig.working({"count": toy.slow}):
        id = (await rig.start("count")).id
        await eventually(lambda: toy.runs)
        assert (await rig.ledger.cancel(id)).state == model.CANCELLING
        job = await rig.end(id)
        await queue_is_drained(rig)
        await rig.lease_is_free(id)
    assert (job.state, toy.cancelled, len(toy.runs)) == (model.CANCELLED, 1, 1)
    assert toy.runs[0].cancelled.is_set()


async def test_a_handler_that_ignores_a_cancel_cannot_hold_the_job(rig: JobRig) -> None:
    async def stubborn(context: JobContext) -> str:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return DIGEST

    release = asyncio.Event()
    async with rig.working({"count": stubborn}):
        id = (await rig.start("count")).id
        await rig.until(id, model.RUNNING)
        await rig.ledger.cancel(id)
        assert (await rig.end(id)).state == model.CANCELLED
        release.set()


async def test_a_result_that_comes_with_the_cancel_is_dropped(rig: JobRig) -> None:
    async def finishes_anyway(context: JobContext) -> str:
        await context.cancelled.wait()
        return DIGEST

    async def shielded(context: JobContext) -> str:
        return await asyncio.shield(asyncio.ensure_future(finishes_anyway(context)))

    async with rig.working({"count": shielded}):
        id = (await rig.start("count")).id
        await rig.until(id, model.RUNNING)
        await rig.ledger.cancel(id)
        job = await rig.end(id)
    assert (job.state, job.result_digest) == (model.CANCELLED, "")


async def test_check_alive_returns_while_the_attempt_owns_the_job(rig: JobRig) -> None:
    async def handler(context: JobContext) -> str:
        await context.check_alive()
        return DIGEST

    async with rig.working({"count": handler}):
        assert (await rig.end((await rig.start("count")).id)).state == model.SUCCEEDED


async def test_check_alive_refuses_an_effect_after_a_cancel(rig: JobRig) -> None:
    record = await rig.ledger.read((await rig.start("count")).id)
    claimed = await rig.ledger.change(record.job.id, lambda r: model.claim(r, fence=1, now_ns=0))
    context = JobContext(rig.ledger, claimed)
    await rig.ledger.cancel(record.job.id)
    with pytest.raises(JobCancelled):
        await context.check_alive()


async def test_check_alive_refuses_an_effect_of_an_old_holder(rig: JobRig) -> None:
    """R-121: fencing, also for effects outside the ledger."""
    id = (await rig.start("count")).id
    old = JobContext(rig.ledger, await rig.ledger.change(id, lambda r: model.claim(r, fence=1, now_ns=0)))
    await rig.ledger.change(id, lambda r: model.requeue(r, "worker lost", now_ns=0))
    with pytest.raises(LeaseLost):
        await old.check_alive()
    await rig.ledger.change(id, lambda r: model.claim(r, fence=2, now_ns=0))
    with pytest.raises(LeaseLost):
        await old.check_alive()


async def test_a_lost_lease_ends_the_handler_and_another_attempt_does_the_work(rig: JobRig) -> None:
    """R-120: the job follows the lease."""
    toy = Toy()
    async with rig.working({"count": toy.slow}, slots=2):
        id = (await rig.start("count")).id
        await eventually(lambda: toy.runs)
        await take_lease_away(rig, id)
        await eventually(lambda: len(toy.runs) == 2)
        toy.gate.set()
        job = await rig.end(id)
    assert (job.state, job.attempt, toy.cancelled) == (model.SUCCEEDED, 2, 1)
    assert (await rig.ledger.read(id)).fence == toy.runs[1].fence


async def test_the_late_result_of_an_old_holder_is_refused(rig: JobRig) -> None:
    """R-121: the first attempt finishes after the second was given the job; only the second writes."""
    gates = [asyncio.Event(), asyncio.Event()]
    results = [digest_bytes(b"old"), digest_bytes(b"new")]
    begun: list[int] = []

    async def deaf(context: JobContext) -> str:
        turn = len(begun)
        begun.append(context.fence)
        while not gates[turn].is_set():
            try:
                await gates[turn].wait()
            except asyncio.CancelledError:
                continue
        return results[turn]

    async with rig.working({"count": deaf}, slots=2):
        id = (await rig.start("count")).id
        await eventually(lambda: len(begun) == 1)
        await take_lease_away(rig, id)
        await eventually(lambda: len(begun) == 2)
        gates[0].set()
        await asyncio.sleep(0.5)
        assert (await rig.ledger.get(id)).state == model.RUNNING
        gates[1].set()
        job = await rig.end(id)
    assert (job.state, job.result_digest) == (model.SUCCEEDED, results[1])
