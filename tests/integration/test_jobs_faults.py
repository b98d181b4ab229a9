"""Jobs under faults: real worker processes and the real NATS, killed, halted and started again in the middle."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from jobs_toy import STEPS, Effects, result_of, worker_process
from smelt.job.v1 import job_pb2

from smeltkit.bus import Bus
from smeltkit.errors import BusUnavailable
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.testing.jobs import BOUNDS, JobRig
from smeltkit.testing.waiting import eventually


@pytest.fixture
def effects(tmp_path: Path) -> Effects:
    """What worker processes did."""
    return Effects(tmp_path / "effects")


def one_effect(effects: Effects, job: job_pb2.Job) -> None:
    """The job succeeded, and exactly one run did its effect: the one whose result is stored."""
    done = effects.of(job.id, "done")
    assert job.state == model.SUCCEEDED
    assert len(done) == 1
    assert job.result_digest == result_of(done[0][1])
    assert (job.progress.done, job.attempt) == (STEPS, done[0][0])


async def begun(effects: Effects, id: str, attempts: int = 1) -> None:
    """Returns when so many runs of the job have begun."""
    await eventually(lambda: len(effects.of(id, "begun")) == attempts, timeout_s=60)


async def test_a_job_of_a_killed_worker_is_finished_by_another(rig: JobRig, effects: Effects) -> None:
    """R-120, R-121: kill -9 in the middle; never "running" for ever, never done twice."""
    with worker_process(rig, effects) as first:
        id = (await rig.start("count")).id
        await begun(effects, id)
        first.kill()
        first.wait()
    assert (await rig.ledger.get(id)).state == model.RUNNING
    with worker_process(rig, effects):
        job = await rig.end(id)
    one_effect(effects, job)
    assert job.attempt == 2
    assert list((await rig.ledger.read(id)).history) == ["attempt 1: worker lost"]


async def test_a_second_worker_that_waits_takes_over(rig: JobRig, effects: Effects) -> None:
    """R-120: no restart is needed where another replica lives."""
    with worker_process(rig, effects) as first:
        id = (await rig.start("once")).id
        await begun(effects, id)
        with worker_process(rig, effects):
            first.kill()
            first.wait()
            job = await rig.end(id)
    one_effect(effects, job)


async def test_a_worker_that_slept_through_its_lease_changes_nothing(rig: JobRig, effects: Effects) -> None:
    """R-121: halted, not killed: it wakes up after another has finished the job, and its effects are refused."""
    with worker_process(rig, effects) as sleeper:
        id = (await rig.start("count")).id
        await begun(effects, id)
        sleeper.send_signal(signal.SIGSTOP)
        with worker_process(rig, effects):
            job = await rig.end(id)
            sleeper.send_signal(signal.SIGCONT)
            again = await rig.start("count")
            await rig.end(again.id)
            assert await rig.ledger.get(id) == job
    one_effect(effects, job)


async def test_a_sleeper_that_wakes_while_another_works_changes_nothing(rig: JobRig, effects: Effects) -> None:
    """R-121: both hold the job in their hands; the newer token wins."""
    with worker_process(rig, effects) as sleeper:
        id = (await rig.start("count")).id
        await begun(effects, id)
        sleeper.send_signal(signal.SIGSTOP)
        with worker_process(rig, effects):
            await begun(effects, id, attempts=2)
            sleeper.send_signal(signal.SIGCONT)
            job = await rig.end(id)
    one_effect(effects, job)
    assert job.attempt == 2


async def test_a_job_that_kills_its_workers_is_given_up_with_a_dead_letter(rig: JobRig, effects: Effects) -> None:
    """R-120, R-124: attempts are bounded; the reason is WORKER_LOST and the letter lies on SMELT_DLQ."""
    id = (await rig.start("die")).id
    for attempt in range(1, BOUNDS.attempts_max + 1):
        with worker_process(rig, effects) as worker:
            await begun(effects, id, attempts=attempt)
            worker.wait()
    with worker_process(rig, effects):
        job = await rig.end(id)
        healthy = await rig.end((await rig.start("count")).id)
    assert (job.state, job.error.reason, job.attempt) == (model.FAILED, "WORKER_LOST", BOUNDS.attempts_max)
    assert len(effects.of(id, "begun")) == BOUNDS.attempts_max
    assert [letter.job_id for letter in await rig.dead_letters(1)] == [id]
    one_effect(effects, healthy)


async def test_a_worker_killed_after_a_cancel_leaves_a_cancelled_job(rig: JobRig, effects: Effects) -> None:
    """R-130: what was cancelled is stopped by the sweeper, never run again."""
    with worker_process(rig, effects) as worker:
        id = (await rig.start("once")).id
        await begun(effects, id)
        worker.send_signal(signal.SIGSTOP)
        await rig.ledger.cancel(id)
        worker.kill()
    with worker_process(rig, effects):
        job = await rig.end(id)
    assert job.state == model.CANCELLED
    assert len(effects.of(id, "begun")) == 1


async def test_a_worker_asked_to_stop_hands_its_job_to_the_next(rig: JobRig, effects: Effects) -> None:
    with worker_process(rig, effects) as first:
        id = (await rig.start("count")).id
        await begun(effects, id)
        first.terminate()
        assert first.wait(30) == 0
    assert (await rig.ledger.get(id)).state == model.QUEUED
    with worker_process(rig, effects):
        one_effect(effects, await rig.end(id))


async def test_jobs_survive_kills_of_every_worker_in_turn(rig: JobRig, effects: Effects) -> None:
    """R-121: several jobs, several workers with a sweeper each, one killed after the other: each job done once."""
    ids = [(await rig.start("count")).id for _ in range(3)]
    for _ in range(2):
        with worker_process(rig, effects), worker_process(rig, effects):
            lines = len(effects.path.read_text().splitlines())
            await eventually(lambda lines=lines: len(effects.path.read_text().splitlines()) > lines, timeout_s=60)
    with worker_process(rig, effects), worker_process(rig, effects):
        for id in ids:
            one_effect(effects, await rig.end(id))


@pytest.mark.parametrize("outage_s", [0.2, 2 * BOUNDS.lease_ttl_s])
async def test_nats_killed_and_restarted_in_the_middle_of_a_job(rig: JobRig, effects: Effects, outage_s: float) -> None:
    """R-120, R-121: shorter and longer than a lease; the same job finishes, once."""
    with worker_process(rig, effects) as worker:
        id = (await rig.start("count")).id
        await begun(effects, id)
        rig.server.kill()
        await asyncio.sleep(outage_s)
        rig.server.start()
        await eventually(lambda: rig.bus.is_connected)
        one_effect(effects, await rig.end(id))
        assert worker.poll() is None


async def test_nats_and_the_worker_killed_at_the_same_time(rig: JobRig, effects: Effects) -> None:
    """R-120: after the restart of both the same job finishes."""
    with worker_process(rig, effects) as worker:
        id = (await rig.start("count")).id
        await begun(effects, id)
        rig.server.kill()
        worker.kill()
        worker.wait()
    rig.server.start()
    await eventually(lambda: rig.bus.is_connected)
    with worker_process(rig, effects):
        one_effect(effects, await rig.end(id))


async def test_nats_that_hangs_for_a_while_is_waited_for(rig: JobRig, effects: Effects) -> None:
    """Halted, not killed: connections stay open and nothing is answered."""
    with worker_process(rig, effects):
        id = (await rig.start("count")).id
        await begun(effects, id)
        rig.server.pause()
        await asyncio.sleep(2 * BOUNDS.lease_ttl_s)
        rig.server.resume()
        one_effect(effects, await rig.end(id))


async def test_calls_fail_with_a_reason_while_nats_is_away_and_work_again_after(rig: JobRig) -> None:
    job = await rig.start("count")
    rig.server.kill()
    for call in (
        lambda: rig.ledger.get(job.id),
        lambda: rig.start("count"),
        lambda: rig.ledger.cancel(job.id),
        lambda: rig.ledger.list(),
        lambda: anext(rig.ledger.watch(job.id)),
    ):
        with pytest.raises(BusUnavailable):
            await call()
    rig.server.start()
    await eventually(lambda: rig.bus.is_connected)
    assert await rig.ledger.get(job.id) == job


async def test_connecting_to_a_nats_that_is_not_there_names_the_remedy(rig: JobRig) -> None:
    rig.server.kill()
    with pytest.raises(BusUnavailable, match="start the platform") as caught:
        await Bus.connect(rig.server.config, name="late")
    assert rig.server.url.split("@")[0].split(":")[-1] not in caught.value.message, "the secret is in the message"


async def test_a_start_that_failed_half_way_is_completed_by_its_repetition(rig: JobRig) -> None:
    """The record was stored and the message was not: the same request id queues it."""
    publish, fails = rig.bus.publish, [True]

    async def flaky(*args: object, **kwargs: object) -> int:
        if fails.pop() if fails else False:
            raise BusUnavailable("away")
        return await publish(*args, **kwargs)  # type: ignore[arg-type]

    rig.bus.publish = flaky  # type: ignore[method-assign]
    with pytest.raises(BusUnavailable):
        await rig.start("count", "one")
    assert await rig.ledger.is_queue_empty("toy")
    await rig.start("count", "one")
    assert not await rig.ledger.is_queue_empty("toy")


async def test_an_idle_worker_survives_an_outage_and_takes_the_next_job(rig: JobRig, effects: Effects) -> None:
    with worker_process(rig, effects) as worker:
        await rig.end((await rig.start("count")).id)
        rig.server.kill()
        await asyncio.sleep(2 * BOUNDS.lease_ttl_s)
        rig.server.start()
        await eventually(lambda: rig.bus.is_connected)
        one_effect(effects, await rig.end((await rig.start("count")).id))
        assert worker.poll() is None


async def test_a_result_made_while_nats_was_away_is_stored_when_it_is_back(rig: JobRig) -> None:
    """The work was not in vain, as long as nobody else was given the job."""

    async def handler(context: JobContext) -> str:
        rig.server.kill()
        asyncio.get_running_loop().call_later(0.5, rig.server.start)
        return result_of(context.fence)

    async with rig.working({"count": handler}):
        job = await rig.end((await rig.start("count")).id)
    assert (job.state, job.attempt) == (model.SUCCEEDED, 1)


async def test_two_sweepers_and_two_workers_at_once_do_no_harm(rig: JobRig) -> None:
    """R-121: leases vanish under running work while many sweepers look on; each job ends with one result."""
    runs: dict[str, int] = {}

    async def handler(context: JobContext) -> str:
        runs[context.job_id] = runs.get(context.job_id, 0) + 1
        if runs[context.job_id] == 1:
            lease = await rig.ledger.leases.get(context.job_id)
            assert lease is not None
            await rig.ledger.leases.delete(context.job_id, lease.revision)
            await context.cancelled.wait()
        return result_of(context.fence)

    async with rig.working({"count": handler}, slots=2, sweepers=3), rig.working({"count": handler}, slots=2):
        ids = [(await rig.start("count")).id for _ in range(6)]
        jobs = [await rig.end(id) for id in ids]
    assert {(job.state, job.attempt) for job in jobs} == {(model.SUCCEEDED, 2)}
    for job in jobs:
        assert job.result_digest == result_of((await rig.ledger.read(job.id)).fence)
    assert set(runs.values()) == {2}
