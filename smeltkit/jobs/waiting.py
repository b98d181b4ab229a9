"""What a queued job waits for, as far as its caller may know: told wherever a job is read, stored nowhere."""

from __future__ import annotations

import time

from smelt.job.v1 import job_pb2

from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger
from smeltkit.rpc.context import TENANT

PHASE = "wait for its turn"
"""Phase of a job that waits for others of its service."""


async def with_wait(ledger: JobLedger, job: job_pb2.Job) -> job_pb2.Job:
    """The job; one that is queued behind others of its service with what it waits for, and for how long by now."""
    if job.state != model.QUEUED:
        return job
    records, _ = await ledger.records()
    others = [one.job for one in records if one.job.service == job.service and one.job.id != job.id]
    running = [_told(one) for one in others if one.state in (model.RUNNING, model.CANCELLING)]
    earlier = [one for one in others if one.state == model.QUEUED and _ns(one) < _ns(job)]
    if not running and not earlier:
        return job
    found = job_pb2.Job()
    found.CopyFrom(job)
    behind = [*running, *([f"{len(earlier)} queued before it"] if earlier else [])]
    found.progress.phase, found.progress.done, found.progress.total = PHASE, 0, 0
    found.progress.message = f"for {_since(_ns(job))}, behind {', '.join(behind)}"
    return found


def _told(job: job_pb2.Job) -> str:
    """A job that runs, by its id if it is the caller's to know."""
    name = job.id if TENANT.get() in ("", job.tenant) else "a job of another tenant"
    amount = f" {job.progress.done}/{job.progress.total}" if job.progress.total else ""
    doing = f"{job.kind}: {job.progress.phase}".rstrip(": ")
    return f"{name} ({doing}{amount}, asked for {_since(_ns(job, 'create'))} ago)"


def _ns(job: job_pb2.Job, what: str = "update") -> int:
    return int((job.create_time if what == "create" else job.update_time).ToNanoseconds())


def _since(ns: int) -> str:
    seconds = max(time.time_ns() - ns, 0) // 10**9
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min"
