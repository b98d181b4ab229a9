"""Finds jobs that nobody cares for any more. One runs in every service; several at once do no harm.

Every decision is a pure function of a record and what is known about its lease, and is written by compare-and-swap on
the very record it was made from: of two sweepers one wins, and a worker that is alive after all wins over both. Times
are measured here and never taken from a record: the clocks of two machines may differ by an hour.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from enum import Enum

from smelt.job.v1 import job_pb2

from smeltkit import limits, telemetry
from smeltkit.errors import NoWorker, RevisionConflict, SmeltError, WorkerLost
from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.ledger import JobLedger, failure_of
from smeltkit.jobs.tasks import pause
from smeltkit.jobs.worker import presence_key
from smeltkit.telemetry import names

_log = logging.getLogger(__name__)


class Care(Enum):
    """What a job needs."""

    NOTHING = "nothing"
    REQUEUE = "requeue"
    GIVE_UP = "give up"
    STOP = "stop"
    NO_WORKER = "no worker"
    DISPATCH = "dispatch"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What is known about a job beside its record."""

    has_lease: bool
    """Whether its lease lives (for jobs that run)."""
    without_worker_s: float
    """For how long no worker of its service was seen."""
    is_queue_empty: bool
    """Whether its service's queue holds no message at all."""
    age_s: float
    """Time since its record changed, as far as this sweeper has seen it."""


def care_for(record: job_pb2.JobRecord, around: Surroundings, bounds: JobBounds) -> Care:
    """What `record` needs in its surroundings; pure."""
    state = record.job.state
    if state in (model.RUNNING, model.CANCELLING):
        if around.has_lease:
            return Care.NOTHING
        if state == model.CANCELLING:
            return Care.STOP
        return Care.GIVE_UP if record.job.attempt >= bounds.attempts_max else Care.REQUEUE
    if state == model.QUEUED:
        if min(around.without_worker_s, around.age_s) >= bounds.no_worker_s:
            return Care.NO_WORKER
        patience_s = bounds.sweep_period_s if around.is_queue_empty else limits.JOB_REDISPATCH_S
        if around.age_s >= patience_s:
            return Care.DISPATCH
    return Care.NOTHING


class Sweeper:
    """Sweeps again and again; remembers what it has read, so that a sweep reads only what changed."""

    def __init__(self, ledger: JobLedger) -> None:
        self._ledger = ledger
        self._revision = 0
        self._open: dict[str, job_pb2.JobRecord] = {}
        self._changed_at: dict[str, float] = {}
        self._dispatched: dict[str, str] = {}
        self._worker_seen: dict[str, float] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Sweeps every `sweep_period_s` until `stop` is set; outages of NATS are waited out."""
        while not stop.is_set():
            try:
                await self.sweep()
            except SmeltError as error:
                _log.warning("sweeper: %s", error)
            await pause(stop, self._ledger.bounds.sweep_period_s)

    async def sweep(self) -> None:
        """One look at every job that is not over. BusUnavailable if NATS is away; the next sweep sees the rest."""
        await self._refresh()
        without_worker_s = await self._without_worker()
        is_empty = await self._empty_queues()
        self._measure()
        for record in list(self._open.values()):
            job = record.job
            is_held = job.state in (model.RUNNING, model.CANCELLING) and await self._is_leased(job.id)
            around = Surroundings(
                has_lease=is_held,
                without_worker_s=without_worker_s.get(job.service, 0.0),
                is_queue_empty=is_empty.get(job.service, False),
                age_s=time.monotonic() - self._changed_at[job.id],
            )
            care = care_for(record, around, self._ledger.bounds)
            if care is not Care.NOTHING:
                await self._give(record, care, around)

    async def _refresh(self) -> None:
        records, last = await self._ledger.records(self._revision)
        now_s = time.time()
        for record in records:
            self._open[record.job.id], self._changed_at[record.job.id] = record, time.monotonic()
            if record.job.state in model.FINAL:
                del self._open[record.job.id], self._changed_at[record.job.id]
                self._dispatched.pop(record.job.id, None)
                # Who ended the job may have died before the letter was sent: it is sent again, and stored once.
                if now_s - record.job.update_time.ToNanoseconds() / 1e9 < limits.JOB_DEAD_REPAIR_S:
                    await self._ledger.bury(record)
        self._revision = last

    def _measure(self) -> None:
        """Tells for how long the oldest job in each queue has been seen there, 0 for a queue that is empty by now."""
        now = time.monotonic()
        waits = dict.fromkeys(self._worker_seen, 0.0)
        for record in self._open.values():
            if record.job.state == model.QUEUED:
                service = record.job.service
                waits[service] = max(waits.get(service, 0.0), now - self._changed_at[record.job.id])
        for service, wait_s in waits.items():
            telemetry.latest(names.JOB_WAIT).set(wait_s, {names.SERVICE: service})
            # A counter that begins at one shows no increase.
            telemetry.counter(names.JOBS_DEAD).add(0, {names.SERVICE: service})

    async def _is_leased(self, id: str) -> bool:
        return await self._ledger.leases.get(id) is not None

    async def _without_worker(self) -> dict[str, float]:
        """For each service with open jobs: seconds since this sweeper last saw a worker, or first missed one."""
        keys = [entry.key for entry in await self._ledger.leases.entries()]
        now = time.monotonic()
        for service in {record.job.service for record in self._open.values()}:
            is_served = any(key.startswith(presence_key(service)) for key in keys)
            if is_served or service not in self._worker_seen:
                self._worker_seen[service] = now
        return {service: now - seen for service, seen in self._worker_seen.items()}

    async def _empty_queues(self) -> dict[str, bool]:
        queued = {record.job.service for record in self._open.values() if record.job.state == model.QUEUED}
        return {service: await self._ledger.is_queue_empty(service) for service in queued}

    async def _give(self, record: job_pb2.JobRecord, care: Care, around: Surroundings) -> None:
        job = record.job
        if care is Care.DISPATCH:
            await self._dispatch_again(record, around)
            return
        try:
            changed = await self._ledger.replace(record, self._changed(record, care))
        except RevisionConflict:  # somebody was faster, or the job has ended
            return
        _log.info("job %s: %s after attempt %d", job.id, care.value, job.attempt)
        if model.is_dead(changed):
            telemetry.counter(names.JOBS_DEAD).add(1, {names.SERVICE: job.service})
        if changed.job.state == model.QUEUED:
            await self._ledger.dispatch(changed)
        await self._ledger.bury(changed)

    async def _dispatch_again(self, record: job_pb2.JobRecord, around: Surroundings) -> None:
        """Replaces a lost message: once in a period, by one of however many sweepers."""
        period_s = self._ledger.bounds.sweep_period_s if around.is_queue_empty else limits.JOB_REDISPATCH_S
        salt = f".{time.time_ns() // max(int(period_s * 1e9), 1)}"
        if self._dispatched.get(record.job.id) != salt:
            _log.info("job %s: its message is sent again", record.job.id)
            await self._ledger.dispatch(record, salt=salt)
            self._dispatched[record.job.id] = salt

    def _changed(self, record: job_pb2.JobRecord, care: Care) -> job_pb2.JobRecord:
        job, bounds, now_ns = record.job, self._ledger.bounds, time.time_ns()
        if care is Care.REQUEUE:
            return model.requeue(record, "worker lost", now_ns=now_ns)
        if care is Care.STOP:
            return model.stop(record, now_ns=now_ns)
        error: SmeltError
        if care is Care.GIVE_UP:
            error = WorkerLost(f"the workers of job {job.id} died {job.attempt} times; see the log of {job.service}")
        else:
            error = NoWorker(f"no worker of {job.service} for {bounds.no_worker_s:g} s; start it and run again")
        return model.fail(record, failure_of(error), now_ns=now_ns, is_dead=True)


async def run_sweeper(ledger: JobLedger, stop: asyncio.Event) -> None:
    """Sweeps until `stop` is set."""
    await Sweeper(ledger).run(stop)
