"""Start, get, list, watch and cancel on the real ledger, without any worker."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import aclosing
from pathlib import Path

import pytest
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.bus.subjects import JOBS_BUCKET
from smeltkit.errors import BadRequest, CorruptRecord, RequestIdReused, UnknownJob
from smeltkit.ids import digest_bytes
from smeltkit.jobs import model
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.testing.jobs import SERVICE, JobRig, connected
from smeltkit.testing.waiting import eventually

DIGEST = digest_bytes(b"result")


async def test_a_started_job_waits_in_the_queue(rig: JobRig) -> None:
    job = await rig.start("count")
    assert (job.state, job.attempt, job.service, job.kind) == (model.QUEUED, 0, SERVICE, "count")
    assert await rig.ledger.get(job.id) == job
    assert not await rig.ledger.is_queue_empty(SERVICE)


async def test_the_same_request_id_gives_the_same_job(rig: JobRig) -> None:
    """R-121: a repeated start has no second effect."""
    first, second = await rig.start("count", "one"), await rig.start("count", "one")
    assert first == second
    assert len(await rig.ledger.list()) == 1


async def test_many_starts_at_once_with_one_request_id_make_one_job(rig: JobRig) -> None:
    jobs = await asyncio.gather(*(rig.start("count", "one") for _ in range(20)))
    assert len({job.id for job in jobs}) == 1
    info = await rig.bus.jetstream.stream_info("SMELT_JOBS")
    assert info.state.messages == 1


@pytest.mark.parametrize(("kind", "body"), [("count", "other"), ("other", "")])
async def test_a_request_id_with_another_request_is_refused(rig: JobRig, kind: str, body: str) -> None:
    first = await rig.start("count", "one")
    with pytest.raises(RequestIdReused) as caught:
        await rig.start(kind, "one", body)
    assert caught.value.details["first_digest"] == first.request_digest
    assert caught.value.details["second_digest"] != first.request_digest


async def test_a_cached_result_is_success_without_a_worker(rig: JobRig) -> None:
    job = await rig.ledger.start(
        service=SERVICE, kind="count", request=job_pb2.GetJobRequest(), request_id="one", cached_digest=DIGEST
    )
    assert (job.state, job.result_digest, job.is_cached) == (model.SUCCEEDED, DIGEST, True)
    assert await rig.ledger.is_queue_empty(SERVICE)


@pytest.mark.parametrize("request_id", ["", "x" * (limits.JOB_REQUEST_ID_MAX_CHARS + 1)])
async def test_a_request_id_out_of_bounds_is_refused(rig: JobRig, request_id: str) -> None:
    with pytest.raises(BadRequest, match="request_id"):
        await rig.ledger.start(service=SERVICE, kind="count", request=job_pb2.GetJobRequest(), request_id=request_id)


async def test_a_request_out_of_bounds_is_refused(rig: JobRig) -> None:
    with pytest.raises(BadRequest, match="send digests"):
        await rig.start("count", body="x" * limits.JOB_REQUEST_MAX_BYTES)


async def test_a_kind_that_would_leave_its_subject_is_refused(rig: JobRig) -> None:
    with pytest.raises(BadRequest, match="kind"):
        await rig.start("count.>")


@pytest.mark.parametrize("id", ["", "job-" + "0" * 24, "job-*", "../job-1", "job-a.b", "job-\u00e9"])
async def test_an_unknown_id_is_not_found(rig: JobRig, id: str) -> None:
    with pytest.raises(UnknownJob):
        await rig.ledger.get(id)
    with pytest.raises(UnknownJob):
        await rig.ledger.cancel(id)
    with pytest.raises(UnknownJob):
        async for _ in rig.ledger.watch(id):
            pass


async def test_jobs_are_listed_newest_first_by_service_and_limit(rig: JobRig) -> None:
    ids = [(await rig.start("count")).id for _ in range(3)]
    await rig.ledger.start(service="other", kind="k", request=job_pb2.GetJobRequest(), request_id="o")
    assert [job.id for job in await rig.ledger.list(service=SERVICE)] == ids[::-1]
    assert [job.id for job in await rig.ledger.list(service=SERVICE, limit=2)] == ids[:0:-1]
    with pytest.raises(BadRequest):
        await rig.ledger.list(limit=-1)


async def test_jobs_of_one_tenant_are_listed_alone(rig: JobRig) -> None:
    await rig.start("count")
    other = await rig.ledger.start(
        service=SERVICE, kind="count", request=job_pb2.GetJobRequest(), request_id="t", tenant="acme"
    )
    assert [job.id for job in await rig.ledger.list(tenant="acme")] == [other.id]


async def test_a_watch_gives_the_present_state_then_each_change_then_ends(rig: JobRig) -> None:
    id = (await rig.start("count")).id
    states = []
    async for job in rig.ledger.watch(id):
        if not states or states[-1] != job.state:
            states.append(job.state)
        if job.state == model.QUEUED:
            await rig.ledger.change(id, lambda record: model.claim(record, fence=1, now_ns=0))
        if job.state == model.RUNNING:
            await rig.ledger.change(id, lambda record: model.succeed(record, DIGEST, fence=1, now_ns=0))
    assert states == [model.QUEUED, model.RUNNING, model.SUCCEEDED]


async def test_a_watch_of_a_job_that_is_over_is_one_answer(rig: JobRig) -> None:
    job = await rig.start("count")
    await rig.ledger.cancel(job.id)
    assert [seen.state async for seen in rig.ledger.watch(job.id)] == [model.CANCELLED]


async def test_a_silent_watch_repeats_the_last_state_as_a_heartbeat(rig: JobRig) -> None:
    job = await rig.start("count")
    seen = []
    async with aclosing(rig.ledger.watch(job.id)) as jobs:
        async for heartbeat in jobs:
            seen.append(heartbeat)
            if len(seen) == 3:
                break
    assert seen == [job, job, job]


async def test_a_watch_lives_through_an_outage(rig: JobRig) -> None:
    job = await rig.start("count")
    async with aclosing(rig.ledger.watch(job.id)) as watch:
        assert (await anext(watch)).state == model.QUEUED
        rig.server.kill()
        assert (await anext(watch)).state == model.QUEUED
        rig.server.start()
        await eventually(lambda: rig.bus.is_connected)
        await rig.ledger.cancel(job.id)
        assert [seen.state async for seen in watch][-1] == model.CANCELLED


async def test_cancelling_a_queued_job_ends_it_at_once(rig: JobRig) -> None:
    job = await rig.start("count")
    assert (await rig.ledger.cancel(job.id)).state == model.CANCELLED


async def test_cancelling_twice_changes_nothing_more(rig: JobRig) -> None:
    job = await rig.start("count")
    first = await rig.ledger.cancel(job.id)
    assert await rig.ledger.cancel(job.id) == first


async def test_many_writers_at_once_all_get_their_change_in(rig: JobRig) -> None:
    id = (await rig.start("count")).id
    await rig.ledger.change(id, lambda record: model.claim(record, fence=1, now_ns=0))

    async def report(done: int) -> None:
        progress = job_pb2.Progress(phase="count", done=done)
        await rig.ledger.change(id, lambda record: model.report(record, progress, fence=1, now_ns=0))

    await asyncio.gather(*(report(done) for done in range(8)))
    assert (await rig.ledger.get(id)).progress.done == 7


ANOTHER_JOB = job_pb2.JobRecord(job=job_pb2.Job(id="job-0")).SerializeToString()


@pytest.mark.parametrize("value", [b"\xff\xff\xff", b"", ANOTHER_JOB])
async def test_a_corrupt_record_is_named_and_stops_nothing_else(rig: JobRig, value: bytes) -> None:
    healthy = await rig.start("count")
    await rig.bus.bucket(JOBS_BUCKET).create("job-broken", value)
    later = await rig.start("count")
    with pytest.raises(CorruptRecord, match="job-broken"):
        await rig.ledger.get("job-broken")
    assert {job.id for job in await rig.ledger.list()} == {healthy.id, later.id}
    await Sweeper(rig.ledger).sweep()


async def test_the_ledger_is_the_same_for_every_process(rig: JobRig) -> None:
    job = await rig.start("count")
    async with connected(rig.server) as other:
        assert await other.ledger.get(job.id) == job
        await other.ledger.cancel(job.id)
    assert (await rig.ledger.get(job.id)).state == model.CANCELLED


async def test_nothing_stored_names_this_host(rig: JobRig) -> None:
    """R-127: no host name, no path."""
    await rig.start("count")
    # As a word: the random letters of an id may well hold a short name.
    host = re.compile(rb"(?<![0-9a-z])" + re.escape(socket.gethostname().encode()) + rb"(?![0-9a-z])")
    for bucket in (JOBS_BUCKET, "smelt_leases"):
        for entry in await rig.bus.bucket(bucket).entries():
            assert not host.search(entry.value)
            assert str(Path.cwd()).encode() not in entry.value
