"""A real worker on a real queue: what it does with every way a job can go."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from jobs_handler import DIGEST, Toy, queue_again, queue_is_drained
from smelt.job.v1 import job_pb2

from smeltkit import telemetry
from smeltkit.bus import topology
from smeltkit.bus.deadletter import read_dead
from smeltkit.bus.leases import acquire
from smeltkit.bus.subjects import JOBS_BUCKET, JOBS_STREAM
from smeltkit.errors import BadSafetensors, GateFailed, StoreUnavailable
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.telemetry import names
from smeltkit.testing.jobs import BOUNDS, SERVICE, JobRig, connected, job_rig
from smeltkit.testing.spans import captured_spans, metric_points
from smeltkit.testing.waiting import eventually


async def test_a_job_runs_to_its_result(rig: JobRig) -> None:
    toy = Toy()
    async with rig.working({"count": toy}):
        job = await rig.end((await rig.start("count", body="x")).id)
    assert (job.state, job.attempt, job.result_digest) == (model.SUCCEEDED, 1, DIGEST)
    assert job_pb2.GetJobRequest.FromString(toy.runs[0].request).id == "x"
    assert toy.runs[0].fence > 0


async def test_a_message_redelivered_before_during_and_after_the_work_has_no_second_effect(rig: JobRig) -> None:
    """R-121: the record decides, not the message."""
    toy = Toy()
    id = (await rig.start("count")).id
    await queue_again(rig, id)
    async with rig.working({"count": toy.slow}, slots=3):
        await eventually(lambda: toy.runs)
        await queue_again(rig, id)
        await queue_is_drained(rig)
        toy.gate.set()
        ended = await rig.end(id)
        await queue_again(rig, id)
        await queue_is_drained(rig)
        assert await rig.ledger.get(id) == ended
    assert len(toy.runs) == 1


async def test_a_start_repeated_while_the_job_runs_has_no_second_effect(rig: JobRig) -> None:
    """R-121: the same request id, the same job."""
    toy = Toy()
    async with rig.working({"count": toy.slow}, slots=2):
        id = (await rig.start("count", "one")).id
        await eventually(lambda: toy.runs)
        assert (await rig.start("count", "one")).id == id
        toy.gate.set()
        await rig.end(id)
        assert (await rig.start("count", "one")).state == model.SUCCEEDED
        await queue_is_drained(rig)
    assert len(toy.runs) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadSafetensors("model.safetensors is truncated"), "BAD_SAFETENSORS"),
        (MemoryError(), "OUT_OF_MEMORY"),
        (ValueError("a bug"), "INTERNAL_ERROR"),
        (GateFailed("pass@1 0.31 is below 0.35"), "GATE_FAILED"),
    ],
)
async def test_a_deterministic_error_fails_at_once(rig: JobRig, error: Exception, reason: str) -> None:
    """R-124, R-105: what would fail the same way again is not run again, and leaves no result to go on with."""
    toy = Toy(error)
    async with rig.working({"count": toy}):
        job = await rig.end((await rig.start("count")).id)
        await queue_is_drained(rig)
    assert (job.state, job.attempt, job.error.reason) == (model.FAILED, 1, reason)
    assert job.result_digest == ""
    assert len(toy.runs) == 1
    assert await read_dead(rig.bus) == []


async def test_an_unexpected_error_tells_nothing_from_inside(rig: JobRig) -> None:
    """R-127: the record has the type and a correlation id; message and path stay in the log."""
    async with rig.working({"count": Toy(OSError("/secret/place is full"))}):
        job = await rig.end((await rig.start("count")).id)
    assert "/secret" not in job.error.message
    assert job.error.details["correlation_id"] in job.error.message


@pytest.mark.parametrize("error", [StoreUnavailable("the store is away"), ConnectionResetError()])
async def test_a_retryable_error_is_tried_again(rig: JobRig, error: Exception) -> None:
    toy = Toy(error, error)
    async with rig.working({"count": toy}):
        id = (await rig.start("count")).id
        job = await rig.end(id)
    assert (job.state, job.attempt) == (model.SUCCEEDED, 3)
    assert [line.split(":")[0] for line in (await rig.ledger.read(id)).history] == ["attempt 1", "attempt 2"]
    assert len({run.fence for run in toy.runs}) == 3


async def test_a_job_that_was_begun_goes_before_those_that_were_not(rig: JobRig) -> None:
    """Tried again after an error, or queued again since its worker died; one that waited all the while is next.

    The second worker is started while the dead one's lease lives, as a service that is killed and comes back.
    """
    toy = Toy(StoreUnavailable("away"))
    failing, fresh = [(await rig.start("count")).id for _ in range(2)]
    async with rig.working({"count": toy}):
        await rig.end(fresh)
    assert [run.job_id for run in toy.runs] == [failing, failing, fresh]
    for _ in range(3):  # a starved machine may let the wait for the dead one's lease run out
        lost, fresh = [(await rig.start("count")).id for _ in range(2)]
        lease = await acquire(rig.ledger.leases, lost, BOUNDS.lease_ttl_s)
        assert lease is not None
        await rig.ledger.change(lost, partial(model.claim, fence=lease.fence, now_ns=time.time_ns()))
        toy.runs.clear()
        async with rig.working({"count": toy}):
            await rig.end(fresh)
            await rig.end(lost)
        if [(run.job_id, run.attempt) for run in toy.runs] == [(lost, 2), (fresh, 1)]:
            return
    pytest.fail("what was never begun went first, three times")


async def test_a_retryable_error_that_stays_uses_up_the_attempts_and_leaves_a_dead_letter(rig: JobRig) -> None:
    toy = Toy(*[StoreUnavailable("the store is away")] * 9)
    async with rig.working({"count": toy}):
        id = (await rig.start("count")).id
        job = await rig.end(id)
        dead = await rig.dead_letters(1)
    assert len(toy.runs) == BOUNDS.attempts_max
    assert (job.state, job.attempt, job.error.reason) == (model.FAILED, BOUNDS.attempts_max, "STORE_UNAVAILABLE")
    assert [(letter.job_id, letter.reason, letter.attempts) for letter in dead] == [(id, "STORE_UNAVAILABLE", 3)]


async def test_a_kind_that_nobody_knows_fails_with_what_is_known(rig: JobRig) -> None:
    async with rig.working({"count": Toy()}):
        job = await rig.end((await rig.start("paint")).id)
    assert (job.state, job.error.reason) == (model.FAILED, "NOT_BUILT")
    assert "count" in job.error.message


async def test_progress_is_stored_throttled_and_never_goes_back(rig: JobRig) -> None:
    async def count(context: JobContext) -> str:
        for done in (1, 5, 3, 9, 400):
            for _ in range(50):
                await context.progress("count", done, 500, "steps")
            await asyncio.sleep(0.1)
        return DIGEST

    seen: list[int] = []
    async with rig.working({"count": count}):
        id = (await rig.start("count")).id
        async for job in rig.ledger.watch(id):
            seen.append(job.progress.done)
    assert seen == sorted(seen)
    assert seen[-1] == 400
    assert job.revision < 125, "250 reports are not 250 writes"


async def test_a_worker_that_shuts_down_hands_its_job_back_unspent(rig: JobRig) -> None:
    toy = Toy()
    async with rig.working({"count": toy.slow}, sweepers=0):
        id = (await rig.start("count")).id
        await eventually(lambda: toy.runs)
    job = await rig.ledger.get(id)
    assert (job.state, job.attempt, toy.cancelled) == (model.QUEUED, 0, 1)
    toy.gate.set()
    async with rig.working({"count": toy.slow}):
        assert (await rig.end(id)).attempt == 1


async def test_slots_run_side_by_side(rig: JobRig) -> None:
    toy = Toy()
    async with rig.working({"count": toy.slow}, slots=3):
        ids = [(await rig.start("count")).id for _ in range(4)]
        await eventually(lambda: len(toy.runs) == 3)
        toy.gate.set()
        assert {(await rig.end(id)).state for id in ids} == {model.SUCCEEDED}
    assert len(toy.runs) == 4


async def test_a_job_whose_message_is_lost_is_queued_again(rig: JobRig) -> None:
    toy = Toy()
    id = (await rig.start("count")).id
    await rig.bus.jetstream.purge_stream(JOBS_STREAM)
    async with rig.working({"count": toy}):
        assert (await rig.end(id)).state == model.SUCCEEDED


async def test_jobs_of_a_service_without_workers_fail_with_a_reason() -> None:
    """R-120: nothing waits for ever."""
    async with job_rig(JobBounds(**{**vars(BOUNDS), "no_worker_s": 0.6})) as rig, rig.working({}) as stop:
        other = await rig.ledger.start(
            service="absent", kind="count", request=job_pb2.GetJobRequest(), request_id="one"
        )
        job = await rig.end(other.id)
        stop.set()
    assert (job.state, job.error.reason, job.attempt) == (model.FAILED, "NO_WORKER", 0)


async def test_a_busy_worker_is_a_worker() -> None:
    """A queue is not given up while somebody serves it, however slowly."""
    toy = Toy()
    async with job_rig(JobBounds(**{**vars(BOUNDS), "no_worker_s": 0.6})) as rig, rig.working({"count": toy.slow}):
        first, second = await rig.start("count"), await rig.start("count")
        await eventually(lambda: toy.runs)
        await asyncio.sleep(1.5)
        toy.gate.set()
        assert {(await rig.end(job.id)).state for job in (first, second)} == {model.SUCCEEDED}


async def test_a_dead_letter_that_was_not_sent_is_sent_by_the_sweeper_once(rig: JobRig) -> None:
    """Whoever failed the job may die before the letter is out."""
    id = (await rig.start("count")).id
    failure = job_pb2.Failure(reason="WORKER_LOST", message="died")
    await rig.ledger.change(id, lambda r: model.fail(r, failure, now_ns=time.time_ns(), is_dead=True))
    for _ in range(2):
        await Sweeper(rig.ledger).sweep()
    assert [letter.job_id for letter in await read_dead(rig.bus)] == [id]


async def test_a_corrupt_record_stops_neither_worker_nor_sweeper(rig: JobRig) -> None:
    await rig.bus.bucket(JOBS_BUCKET).create("job-broken", b"\xff\xff")
    await queue_again(rig, "job-broken")
    await queue_again(rig, "no id at all \xff")
    async with rig.working({"count": Toy()}):
        assert (await rig.end((await rig.start("count")).id)).state == model.SUCCEEDED


async def test_the_trace_of_the_starter_goes_on_in_the_worker(rig: JobRig) -> None:
    inside: list[str] = []

    async def handler(context: JobContext) -> str:
        inside.append(telemetry.current_trace_id())
        return DIGEST

    with captured_spans() as captured:
        async with rig.working({"count": handler}):
            with telemetry.span("starter") as starter:
                job = await rig.start("count")
            await rig.end(job.id)
    span = captured.named("smelt.job.toy.count")[0]
    trace_id = f"{starter.get_span_context().trace_id:032x}"
    assert job.trace_id == trace_id == inside[0]
    assert span.parent is not None and span.parent.span_id == starter.get_span_context().span_id


async def test_the_age_of_a_job_is_measured_when_it_is_over(rig: JobRig) -> None:
    metric_points(names.JOB_AGE.name)
    async with rig.working({"count": Toy()}):
        await rig.end((await rig.start("count")).id)
    assert {names.SERVICE: SERVICE, names.JOB_STATE: "succeeded"} in metric_points(names.JOB_AGE.name)


async def test_a_failed_attempt_is_a_failed_span(rig: JobRig) -> None:
    with captured_spans() as captured:
        async with rig.working({"count": Toy(BadSafetensors("broken"))}):
            await rig.end((await rig.start("count")).id)
    span = captured.named("smelt.job.toy.count")[0]
    assert span.status.description == "BAD_SAFETENSORS"


async def test_nothing_stored_while_working_names_this_host(rig: JobRig) -> None:
    """R-127: leases and records hold no host name, path or process id."""
    toy = Toy()
    async with rig.working({"count": toy.slow}):
        await rig.start("count")
        await eventually(lambda: toy.runs)
        stored = [e.value for name in (JOBS_BUCKET, "smelt_leases") for e in await rig.bus.bucket(name).entries()]
        assert len(stored) >= 3
        for value in stored:
            assert not re.search(rf"(?<!\w){socket.gethostname()}(?!\w)".encode(), value)
            assert str(Path.cwd()).encode() not in value


async def test_a_service_without_topology_says_what_to_apply(rig: JobRig) -> None:
    """The worker stays and tries again; once the durable exists it works."""
    toy: Callable[[JobContext], Awaitable[str]] = Toy()
    await rig.bus.jetstream.delete_consumer(JOBS_STREAM, f"{SERVICE}-worker")
    async with rig.working({"count": toy}), connected(rig.server) as other:
        id = (await rig.start("count")).id
        await asyncio.sleep(0.5)
        await topology.apply(other.bus, topology.declare(services=[SERVICE], lease_ttl_s=BOUNDS.lease_ttl_s))
        assert (await rig.end(id)).state == model.SUCCEEDED
