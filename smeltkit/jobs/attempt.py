"""One attempt at one job: the handler, and what keeps watch beside it.

While the handler works, three keepers run: one renews the lease, one stores progress, one follows the record for a
cancel. The first thing to happen decides how the attempt ends; the end is written with the fencing token, so that an
attempt that was given up by others changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from smelt.job.v1 import job_pb2

from smeltkit import limits, telemetry
from smeltkit.bus.leases import Lease
from smeltkit.bus.subjects import DEFAULT_TENANT
from smeltkit.errors import (
    BusUnavailable,
    InternalError,
    JobCancelled,
    LeaseLost,
    OutOfMemory,
    ServiceUnavailable,
    SmeltError,
)
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger, failure_of
from smeltkit.jobs.tasks import end_tasks
from smeltkit.rpc.context import TENANT
from smeltkit.telemetry import names
from smeltkit.telemetry.spans import mark_failed

T = TypeVar("T")
_log = logging.getLogger(__name__)


class JobContext:
    """What a handler sees of its attempt."""

    def __init__(self, ledger: JobLedger, record: job_pb2.JobRecord) -> None:
        self._ledger = ledger
        self.job_id = record.job.id
        """The job."""
        self.kind = record.job.kind
        """Kind of work within the service."""
        self.attempt = record.job.attempt
        """Number of this attempt, from 1."""
        self.fence = record.fence
        """Fencing token of this attempt: to be written beside effects that others may repeat."""
        self.request = record.request
        """The request that started the job, serialized."""
        self.cancelled = asyncio.Event()
        """Set when the attempt must end: a cancel, a lost lease or a shutdown. The handler is cancelled as well."""
        self.is_lost = False
        """Whether the lease was lost: somebody else does the job by now."""
        self.latest = job_pb2.Progress()
        """The newest report of progress."""
        self._beside = job_pb2.Progress()
        self._gpu_s, self._gpus, self._gpus_since_s = record.job.gpu_s, 0, 0.0

    @property
    def gpu_s(self) -> float:
        """Seconds for which this attempt and those before it held GPUs, each counted."""
        return self._gpu_s + self._gpus * (time.monotonic() - self._gpus_since_s)

    @contextmanager
    def holding_gpus(self, count: int) -> Iterator[None]:
        """Counts the time of `count` GPUs as the job's for as long as the block lasts."""
        self._gpus, self._gpus_since_s = count, time.monotonic()
        try:
            yield
        finally:
            self._gpu_s, self._gpus = self.gpu_s, 0

    async def progress(self, phase: str, done: int, total: int, unit: str = "", message: str = "") -> None:
        """Reports how far the work is. Cheap: the newest report is stored twice a second at most, by somebody else."""
        if phase == self.latest.phase:
            done = max(done, self.latest.done)
        latest = job_pb2.Progress(phase=phase, done=done, total=total, unit=unit, message=message)
        latest.MergeFrom(self._beside)
        self.latest = latest

    async def measure(
        self, measured: Mapping[str, float], course: Sequence[float], *, alert: str = "", note: str = ""
    ) -> None:
        """Tells the newest numbers of the work and the course of its main one, beside all progress from now on.

        `alert` and `note`, if given, join those that were told before.
        """
        self._beside = job_pb2.Progress(
            measured=measured,
            course=course,
            alerts=[*self._beside.alerts, *([alert] if alert else [])][-limits.JOB_ALERTS_MAX :],
            notes=[*self._beside.notes, *([note] if note else [])][-limits.JOB_ALERTS_MAX :],
        )
        latest = self.latest
        await self.progress(latest.phase, latest.done, latest.total, latest.unit, latest.message)

    async def check_alive(self) -> None:
        """Returns if this attempt still owns the job; to be awaited before every effect.

        LeaseLost if the job was given to somebody else, JobCancelled if it is to stop, BusUnavailable if NATS is away.
        """
        if not self.is_lost:
            record = await self._ledger.read(self.job_id)
            if record.fence == self.fence and record.job.state == model.RUNNING:
                return
            if record.fence == self.fence and record.job.state == model.CANCELLING:
                raise JobCancelled(f"job {self.job_id} was cancelled")
        raise LeaseLost(f"attempt {self.attempt} of job {self.job_id} lost its lease; its effects are refused")


Handler = Callable[[JobContext], Awaitable[str]]
"""Does the work of one kind and returns the digest of the resulting artifact.

It may run again from the start: what earlier attempts stored by digest is found and not made twice.
"""


@dataclass(frozen=True, kw_only=True)
class _End:
    """How an attempt ended: a result, an error, a shutdown, or none of them (cancelled or lost)."""

    result_digest: str = ""
    error: SmeltError | None = None
    is_drained: bool = False


class Attempt:
    """Runs one claimed job to the end of the attempt. `run` returns when the end is stored or another owns the job."""

    def __init__(self, ledger: JobLedger, record: job_pb2.JobRecord, lease: Lease) -> None:
        self._ledger = ledger
        self._bounds = ledger.bounds
        self._record = record
        self._lease = lease
        self._context = JobContext(ledger, record)

    async def run(self, handler: Handler, stop: asyncio.Event) -> None:
        """Runs `handler` under the trace of whoever started the job. `stop` hands the job back to the queue."""
        job = self._record.job
        attributes: dict[str, Any] = {names.JOB_ID: job.id, names.JOB_KIND: job.kind, names.JOB_ATTEMPT: job.attempt}
        with (
            telemetry.attached({"traceparent": self._record.traceparent}),
            telemetry.span(f"smelt.job.{job.service}.{job.kind}", **attributes) as span,
        ):
            renewing = asyncio.create_task(self._keep_lease())
            try:
                end = await self._work(handler, stop, renewing)
                if end.error is not None:
                    mark_failed(span, end.error.reason())
                if not self._context.is_lost:
                    await self._settle(end)
            except LeaseLost:
                self._context.is_lost = True
            finally:
                await end_tasks({renewing}, grace_s=self._bounds.heartbeat_s)
            if self._context.is_lost:
                telemetry.counter(names.LEASES_LOST).add(1, {names.SERVICE: job.service})
                _log.warning("job %s: attempt %d lost its lease; its result is dropped", job.id, job.attempt)
            else:
                await self._release()

    async def _work(self, handler: Handler, stop: asyncio.Event, renewing: asyncio.Task[None]) -> _End:
        tenant = self._record.job.tenant
        served = TENANT.set("" if tenant == DEFAULT_TENANT else tenant)
        work = asyncio.ensure_future(handler(self._context))
        TENANT.reset(served)
        reporting = asyncio.create_task(self._keep_progress())
        following = asyncio.create_task(self._follow())
        stopping = asyncio.create_task(stop.wait())
        keepers = {reporting, following, stopping}
        try:
            await asyncio.wait({work, renewing, following, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return self._outcome(work)
            self._context.is_lost = self._context.is_lost or renewing.done()
            self._context.cancelled.set()
            return _End(is_drained=not renewing.done() and not following.done())
        finally:
            grace_s = self._bounds.cancel_grace_s
            if await end_tasks({work}, grace_s=grace_s, repeat_s=grace_s / 3):
                _log.error("job %s: the handler did not stop within %g s", self._context.job_id, grace_s)
            await end_tasks(keepers, grace_s=self._bounds.heartbeat_s)

    def _outcome(self, work: asyncio.Future[str]) -> _End:
        if work.cancelled():
            return _End(error=InternalError(f"the handler of {self._context.kind} cancelled itself"))
        error = work.exception()
        if error is None:
            return _End(result_digest=work.result())
        if isinstance(error, LeaseLost):
            raise error
        return _End(error=self._classify(error))

    def _classify(self, error: BaseException) -> SmeltError:
        """The error as the record keeps it. What is not ours tells nothing but its type and where to look."""
        if isinstance(error, SmeltError):
            return error
        if isinstance(error, ConnectionError):
            return ServiceUnavailable(f"a connection broke ({type(error).__name__}); try again")
        if isinstance(error, MemoryError):
            return OutOfMemory(f"{self._context.kind} ran out of memory; give it more, or use a smaller model")
        correlation = uuid.uuid4().hex[:12]
        job = self._record.job
        _log.error("job %s: unexpected error %s", job.id, correlation, exc_info=error)
        return InternalError(
            f"unexpected {type(error).__name__}; the log of {job.service} has the details under {correlation}",
            details={"correlation_id": correlation},
        )

    async def _settle(self, end: _End) -> None:
        """Writes the end, and what follows from it. LeaseLost if somebody else owns the job by now."""
        record = await self._patiently(
            lambda: self._ledger.change(
                self._context.job_id, lambda record: model.spend(record, self._ended(record, end), self._context.gpu_s)
            )
        )
        if record.job.state in model.FINAL:
            self._measure(record.job)
        if model.is_dead(record):
            telemetry.counter(names.JOBS_DEAD).add(1, {names.SERVICE: record.job.service})
        if record.job.state == model.QUEUED:
            delay_s = 0.0 if end.is_drained else self._bounds.backoff_after(self._context.attempt)
            await self._patiently(lambda: self._ledger.dispatch(record, delay_s=delay_s))
        await self._patiently(lambda: self._ledger.bury(record))

    def _measure(self, job: job_pb2.Job) -> None:
        age_s = (job.update_time.ToNanoseconds() - job.create_time.ToNanoseconds()) / 1e9
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        telemetry.histogram(names.JOB_AGE).record(age_s, {names.SERVICE: job.service, names.JOB_STATE: state})

    def _ended(self, record: job_pb2.JobRecord, end: _End) -> job_pb2.JobRecord:
        now_ns, fence = time.time_ns(), self._context.fence
        is_retried = end.error is not None and end.error.retryable and self._context.attempt < self._bounds.attempts_max
        if record.fence == fence:
            is_written = record.job.state == model.QUEUED and (is_retried or end.is_drained)
            if record.job.state in model.FINAL or is_written:
                return record  # stored before, and the answer was lost
            if record.job.state == model.CANCELLING:
                return model.stop(record, now_ns=now_ns, fence=fence)
        if end.is_drained:
            return model.requeue(record, "worker shut down", now_ns=now_ns, fence=fence, is_counted=False)
        if end.error is None:
            done = model.report(record, self._context.latest, now_ns=now_ns, fence=fence)
            return model.succeed(done, end.result_digest, now_ns=now_ns, fence=fence)
        if is_retried:
            why = f"{end.error.reason()}: {end.error.message}"
            return model.requeue(record, why, now_ns=now_ns, fence=fence)
        is_dead = end.error.retryable
        return model.fail(record, failure_of(end.error), now_ns=now_ns, fence=fence, is_dead=is_dead)

    async def _patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        """The outcome of `action`, repeated while NATS is away, for JOB_SETTLE_MAX_S at most."""
        deadline = time.monotonic() + limits.JOB_SETTLE_MAX_S
        while True:
            try:
                return await action()
            except BusUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(limits.BUS_RETRY_PAUSE_S)

    async def _keep_lease(self) -> None:
        """Renews the lease; returns when it is lost, or may be because NATS was away for its whole life."""
        while True:
            await asyncio.sleep(self._bounds.heartbeat_s)
            try:
                async with asyncio.timeout(self._lease.remaining_s):
                    await self._lease.renew()
            except (BusUnavailable, TimeoutError):
                if self._lease.remaining_s <= 0:
                    return
            except LeaseLost:
                return

    async def _keep_progress(self) -> None:
        """Stores the newest report whenever it changed; returns when the record takes no more."""
        stored = self._context.latest
        while True:
            await asyncio.sleep(self._bounds.progress_period_s)
            latest = self._context.latest
            if latest is stored:
                continue
            try:
                await self._ledger.change(self._context.job_id, partial(self._told, latest))
                stored = latest
            except BusUnavailable:
                continue
            except SmeltError as error:
                _log.debug("job %s: progress is refused: %s", self._context.job_id, error)
                return

    def _told(self, latest: job_pb2.Progress, record: job_pb2.JobRecord) -> job_pb2.JobRecord:
        told = model.report(record, latest, now_ns=time.time_ns(), fence=self._context.fence)
        return model.spend(record, told, self._context.gpu_s)

    async def _follow(self) -> None:
        """Returns when the record says that this attempt must end: a cancel, or another owner."""
        while True:
            try:
                async with self._ledger.bell(self._context.job_id) as bell:
                    while not await self._is_over():
                        await bell.wait(limits.JOB_WATCH_POLL_S)
                    return
            except BusUnavailable:
                await asyncio.sleep(limits.BUS_RETRY_PAUSE_S)

    async def _is_over(self) -> bool:
        try:
            record = await self._ledger.read(self._context.job_id)
        except BusUnavailable:
            return False
        except SmeltError as error:
            _log.error("job %s: its record is gone: %s", self._context.job_id, error)
            self._context.is_lost = True
            return True
        if record.fence != self._context.fence or record.job.state not in (model.RUNNING, model.CANCELLING):
            self._context.is_lost = True
        return self._context.is_lost or record.job.state == model.CANCELLING

    async def _release(self) -> None:
        try:
            await self._lease.release()
        except BusUnavailable:
            _log.debug("job %s: the lease is left to expire", self._context.job_id)
