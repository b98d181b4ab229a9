"""JobService over a real channel."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from smelt.job.v1 import job_pb2, job_pb2_grpc

from smeltkit.bus.leases import acquire
from smeltkit.errors import UnknownJob
from smeltkit.jobs import model
from smeltkit.jobs.servicer import JobServicer
from smeltkit.jobs.waiting import PHASE, with_wait
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.rpc.context import TENANT
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.testing.jobs import JobRig


@pytest.fixture
async def stub(rig: JobRig) -> AsyncIterator[job_pb2_grpc.JobServiceStub]:
    """A client of a served ledger."""
    host = ServiceHost("jobs", RpcConfig())
    host.add("smelt.job.v1.JobService", job_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(rig.ledger))
    host.set_ready(True)
    await host.start()
    channel: grpc.aio.Channel = open_channel(host.address)
    yield job_pb2_grpc.JobServiceStub(channel)
    await channel.close()
    await host.stop()


async def test_a_job_is_read_listed_and_cancelled(rig: JobRig, stub: job_pb2_grpc.JobServiceStub) -> None:
    job = await rig.start("count")
    got = await call(stub.GetJob, job_pb2.GetJobRequest(id=job.id), timeout_s=10)
    listed = await call(stub.ListJobs, job_pb2.ListJobsRequest(service="toy"), timeout_s=10)
    cancelled = await call(stub.CancelJob, job_pb2.CancelJobRequest(id=job.id), timeout_s=10)
    assert got.job == job
    assert list(listed.jobs) == [job]
    assert cancelled.job.state == model.CANCELLED


async def test_a_queued_job_tells_what_it_waits_for(rig: JobRig, stub: job_pb2_grpc.JobServiceStub) -> None:
    """Who works, how far that is, how many come before it and for how long by now; of another tenant's job no id."""
    first, second, third = [(await rig.start("count")).id for _ in range(3)]
    lease = await acquire(rig.ledger.leases, first, 2.0)
    assert lease is not None
    await rig.ledger.change(first, lambda record: model.claim(record, fence=lease.fence, now_ns=time.time_ns()))
    done = job_pb2.Progress(phase="train", done=3, total=8)
    await rig.ledger.change(first, lambda record: model.report(record, done, fence=lease.fence, now_ns=time.time_ns()))
    told = (await call(stub.GetJob, job_pb2.GetJobRequest(id=third), timeout_s=10)).job.progress
    found = re.fullmatch(
        rf"for \d+ s, behind {first} \(count: train 3/8, asked for \d+ s ago\), 1 queued before it", told.message
    )
    assert found and told.phase == PHASE
    async with stream(stub.WatchJob, job_pb2.WatchJobRequest(id=second), timeout_s=30) as answers:
        async for answer in answers:
            assert first in answer.job.progress.message and "queued before" not in answer.job.progress.message
            break
    token = TENANT.set("other")
    try:
        assert (
            "behind a job of another tenant ("
            in (await with_wait(rig.ledger, await rig.ledger.get(third))).progress.message
        )
    finally:
        TENANT.reset(token)


async def test_a_watch_streams_until_the_end(rig: JobRig, stub: job_pb2_grpc.JobServiceStub) -> None:
    job, states = await rig.start("count"), []
    async with stream(stub.WatchJob, job_pb2.WatchJobRequest(id=job.id), timeout_s=30) as answers:
        async for answer in answers:
            states.append(answer.job.state)
            if len(states) == 1:
                await rig.ledger.cancel(job.id)
    assert (states[0], states[-1]) == (model.QUEUED, model.CANCELLED)


async def test_an_unknown_job_is_a_typed_error(stub: job_pb2_grpc.JobServiceStub) -> None:
    with pytest.raises(UnknownJob):
        await call(stub.GetJob, job_pb2.GetJobRequest(id="job-0"), timeout_s=10)
    with pytest.raises(UnknownJob):
        async with stream(stub.WatchJob, job_pb2.WatchJobRequest(id="job-0"), timeout_s=10) as answers:
            async for _ in answers:
                pass
