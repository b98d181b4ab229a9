"""The ledger: every job is one record in a bucket of NATS, changed only by compare-and-swap.

The record is the truth and its write is the event; the work queue only carries ids. Whatever is lost between the two
(a message, an answer, a process) the sweeper finds by reading records.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from google.protobuf.message import DecodeError, Message
from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2

from smeltkit import limits, telemetry
from smeltkit.bus.deadletter import Publisher, publish_dead
from smeltkit.bus.kv import Bucket, Doorbell, Entry
from smeltkit.bus.subjects import DEFAULT_TENANT, JOBS_BUCKET, LEASES_BUCKET, job_subject
from smeltkit.errors import (
    BadRequest,
    BusUnavailable,
    CorruptRecord,
    RequestIdReused,
    RevisionConflict,
    SmeltError,
    UnknownJob,
)
from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.rpc.context import TENANT

DELAY: Final = "smelt-delay-ms"
"""Header of a queued id: for how long the worker that it is first handed to puts it back. A duration, since clocks of
two machines may differ by more than any delay."""

_log = logging.getLogger(__name__)
_ID = re.compile(r"job-[0-9a-z]{1,60}")
_STATES: Final = frozenset(job_pb2.JobState.values()) - {job_pb2.JOB_STATE_UNSPECIFIED}


class LedgerBus(Publisher, Protocol):
    """What the ledger needs of the bus; `smeltkit.bus.Bus` is one, `smeltkit.testing.bus.MemoryBus` another."""

    def bucket(self, name: str) -> Bucket:
        """The bucket of that name."""

    async def is_queue_empty(self, service: str) -> bool:
        """Whether no id waits in the service's queue and none is in the hands of a worker."""


class JobLedger:
    """Starts, reads, follows and changes jobs. Every call raises BusUnavailable while NATS is away."""

    def __init__(self, bus: LedgerBus, bounds: JobBounds | None = None) -> None:
        self._bus = bus
        self._jobs = bus.bucket(JOBS_BUCKET)
        self.leases = bus.bucket(LEASES_BUCKET)
        self.bounds = bounds or JobBounds()

    async def start(
        self,
        *,
        service: str,
        kind: str,
        request: Message,
        request_id: str,
        tenant: str = "",
        cached_digest: str = "",
    ) -> job_pb2.Job:
        """The job of this request id: a new one in the queue, or the one that is there already.

        Without `tenant` it is that of the call being served. With `cached_digest` it has succeeded at once.
        RequestIdReused if the id came with another request; BadRequest for an id or a request out of bounds. Safe to
        repeat after any failure.
        """
        tenant = tenant or TENANT.get() or DEFAULT_TENANT
        job_subject(service, kind, tenant)
        body = request.SerializeToString(deterministic=True)
        _check_bounds(request_id, body)
        record = model.new_record(
            service=service,
            kind=kind,
            tenant=tenant,
            request=body,
            request_id=request_id,
            now_ns=time.time_ns(),
            trace=(telemetry.current_trace_id(), telemetry.inject().get("traceparent", "")),
            cached_digest=cached_digest,
        )
        try:
            record.job.revision = await self._jobs.create(record.job.id, record.SerializeToString())
        except RevisionConflict:
            first = await self.read(record.job.id)
            if first.job.request_digest != record.job.request_digest:
                raise _reused(request_id, first.job.request_digest, record.job.request_digest) from None
            record = first
        if record.job.state == model.QUEUED:
            await self.dispatch(record)
        return record.job

    async def get(self, id: str) -> job_pb2.Job:
        """The job; UnknownJob, or CorruptRecord if its record does not parse."""
        return (await self.read(id)).job

    async def list(self, *, service: str = "", tenant: str = "", limit: int = 100) -> Sequence[job_pb2.Job]:
        """Jobs, newest first: of one service and one tenant if named. Corrupt records are left out (and logged)."""
        if not 0 <= limit <= limits.JOB_LIST_MAX:
            raise BadRequest(f"limit {limit} must lie in 0..{limits.JOB_LIST_MAX}")
        records, _ = await self.records()
        jobs = [record.job for record in records if service in ("", record.job.service)]
        jobs = [job for job in jobs if tenant in ("", job.tenant)]
        return sorted(jobs, key=lambda job: job.create_time.ToNanoseconds(), reverse=True)[: limit or 100]

    async def watch(self, id: str) -> AsyncGenerator[job_pb2.Job, None]:
        """The job as it is, then after every change until it is over; the last again after each heartbeat of silence.

        An outage of NATS is heartbeats only, and BusUnavailable after JOB_WATCH_OUTAGE_MAX_S of it. Whoever leaves
        early closes it (contextlib.aclosing).
        """
        async with self.bell(id) as bell:
            job = await self.get(id)
            yield job
            sent = answered = begun = time.monotonic()
            while job.state not in model.FINAL and time.monotonic() - begun < limits.JOB_WATCH_MAX_S:
                await bell.wait(min(limits.JOB_WATCH_POLL_S, self.bounds.watch_heartbeat_s))
                fresh = job
                try:
                    fresh = await self.get(id)
                    answered = time.monotonic()
                except BusUnavailable:
                    if time.monotonic() - answered > limits.JOB_WATCH_OUTAGE_MAX_S:
                        raise
                if fresh.revision != job.revision or time.monotonic() - sent >= self.bounds.watch_heartbeat_s:
                    job, sent = fresh, time.monotonic()
                    yield job

    async def cancel(self, id: str) -> job_pb2.Job:
        """Asks the job to stop; the job after that. Idempotent; a job that is over stays as it is."""
        return (await self.change(id, lambda record: model.cancel(record, now_ns=time.time_ns()))).job

    async def read(self, id: str) -> job_pb2.JobRecord:
        """The whole record, its revision filled in; UnknownJob or CorruptRecord."""
        entry = await self._jobs.get(_checked(id))
        if entry is None:
            raise _unknown(id)
        return _parse(entry)

    async def records(self, after_revision: int = 0) -> tuple[Sequence[job_pb2.JobRecord], int]:
        """Records written after a revision, oldest write first, and the last revision seen. Leaves out corrupt ones."""
        found, last = [], after_revision
        for entry in await self._jobs.entries(after_revision):
            last = max(last, entry.revision)
            try:
                found.append(_parse(entry))
            except CorruptRecord as error:
                _log.error("%s", error)
        return found, last

    async def change(self, id: str, step: Callable[[job_pb2.JobRecord], job_pb2.JobRecord]) -> job_pb2.JobRecord:
        """Applies the pure `step` by compare-and-swap, reading again when somebody was faster; the record after it.

        What `step` raises passes through. A step that returns its argument changes nothing.
        """
        for _ in range(limits.CAS_TRIES_MAX):
            record = await self.read(id)
            try:
                return await self.replace(record, step(record))
            except RevisionConflict:
                continue
        raise RevisionConflict(f"job {id} changed {limits.CAS_TRIES_MAX} times while it was to be changed; try again")

    async def replace(self, record: job_pb2.JobRecord, changed: job_pb2.JobRecord) -> job_pb2.JobRecord:
        """Stores `changed` if the stored record is still `record`; RevisionConflict otherwise."""
        if changed is record:
            return record
        changed.job.revision = await self._jobs.update(record.job.id, changed.SerializeToString(), record.job.revision)
        return changed

    def bell(self, id: str) -> AbstractAsyncContextManager[Doorbell]:
        """A doorbell that rings when the job's record changes."""
        return self._jobs.watch(_checked(id))

    async def dispatch(self, record: job_pb2.JobRecord, *, delay_s: float = 0, salt: str = "") -> None:
        """Queues the id of a queued job, once a queueing: however often this is called, by whomever.

        `salt` tells a deliberate repetition (the message was lost) from an accidental one.
        """
        job = record.job
        headers = {DELAY: str(int(delay_s * 1000))} if delay_s else None
        await self._bus.publish(
            job_subject(job.service, job.kind, job.tenant),
            job.id.encode(),
            message_id=f"{job.id}.{job.update_time.ToNanoseconds()}{salt}",
            headers=headers,
        )

    async def is_queue_empty(self, service: str) -> bool:
        """Whether no id waits in the service's queue and none is in the hands of a worker."""
        return await self._bus.is_queue_empty(service)

    async def bury(self, record: job_pb2.JobRecord) -> None:
        """Publishes the dead letter of a job that needs one, once; nothing for any other job."""
        if not model.is_dead(record):
            return
        job = record.job
        dead = event_pb2.JobDead(
            job_id=job.id,
            service=job.service,
            reason=job.error.reason,
            message=job.error.message,
            attempts=job.attempt,
        )
        await publish_dead(self._bus, dead, kind=job.kind, tenant=job.tenant)


def failure_of(error: SmeltError) -> job_pb2.Failure:
    """`error` as a job's record keeps it."""
    return job_pb2.Failure(reason=error.reason(), message=error.message, details=error.details)


def _check_bounds(request_id: str, body: bytes) -> None:
    if not 1 <= len(request_id) <= limits.JOB_REQUEST_ID_MAX_CHARS:
        raise BadRequest(f"request_id of {len(request_id)} characters; allowed: 1 to {limits.JOB_REQUEST_ID_MAX_CHARS}")
    if len(body) > limits.JOB_REQUEST_MAX_BYTES:
        raise BadRequest(f"the request has {len(body)} bytes, at most {limits.JOB_REQUEST_MAX_BYTES}; send digests")


def _checked(id: str) -> str:
    if not _ID.fullmatch(id):
        raise _unknown(id)
    return id


def _unknown(id: str) -> UnknownJob:
    return UnknownJob(f"no job {id!r}; `smelt jobs ls` lists those that exist")


def _parse(entry: Entry) -> job_pb2.JobRecord:
    try:
        record = job_pb2.JobRecord.FromString(entry.value)
    except DecodeError as error:
        raise CorruptRecord(f"the record of job {entry.key} does not parse; delete its key") from error
    if record.job.id != entry.key or record.job.state not in _STATES:
        raise CorruptRecord(f"the record under {entry.key} is that of {record.job.id!r}; delete its key")
    record.job.revision = entry.revision
    return record


def _reused(request_id: str, first: str, second: str) -> RequestIdReused:
    return RequestIdReused(
        f"request id {request_id!r} belongs to another request; make a new id for each request",
        details={"first_digest": first, "second_digest": second},
    )
