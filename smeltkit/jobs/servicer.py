"""JobService: reads and controls the jobs of every service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from smelt.job.v1 import job_pb2, job_pb2_grpc

from smeltkit.errors import UnknownJob
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.waiting import with_wait
from smeltkit.rpc.context import TENANT, RpcContext


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Translates between calls and the ledger. A tenant finds its own jobs alone."""

    def __init__(self, ledger: JobLedger) -> None:
        self._ledger = ledger

    async def GetJob(self, request: job_pb2.GetJobRequest, context: RpcContext) -> job_pb2.GetJobResponse:
        """One job."""
        return job_pb2.GetJobResponse(job=await with_wait(self._ledger, await self._own(request.id)))

    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: RpcContext) -> job_pb2.ListJobsResponse:
        """Jobs, newest first."""
        jobs = await self._ledger.list(service=request.service, limit=request.limit, tenant=TENANT.get())
        return job_pb2.ListJobsResponse(jobs=jobs)

    async def WatchJob(
        self, request: job_pb2.WatchJobRequest, context: RpcContext
    ) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """The present state, then every change until the job is over."""
        await self._own(request.id)
        async with aclosing(self._ledger.watch(request.id)) as jobs:
            async for job in jobs:
                yield job_pb2.WatchJobResponse(job=await with_wait(self._ledger, job))

    async def CancelJob(self, request: job_pb2.CancelJobRequest, context: RpcContext) -> job_pb2.CancelJobResponse:
        """Asks a job to stop."""
        await self._own(request.id)
        return job_pb2.CancelJobResponse(job=await self._ledger.cancel(request.id))

    async def _own(self, id: str) -> job_pb2.Job:
        """The job; UnknownJob also if it is another tenant's than the caller."""
        job = await self._ledger.get(id)
        if TENANT.get() not in ("", job.tenant):
            raise UnknownJob(f"no job {id!r}; `smelt jobs ls` lists those that exist")
        return job
