"""Following a job: a bar a phase on a terminal; elsewhere a line a phase, and one now and then in a long phase.

Where watching breaks, the job is polled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from smelt.job.v1 import job_pb2

from gateway.cli.output import Output, human_bytes
from smeltkit import limits
from smeltkit.errors import JobCancelled, JobFailed, Unavailable

if TYPE_CHECKING:
    from gateway.cli.session import Session

FINAL = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})

_TOLD = frozenset({job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING})
"""States in which progress is told: what is done, or what is waited for."""


async def finish(session: Session, job: job_pb2.Job, bars: Progress | None = None, title: str = "") -> job_pb2.Job:
    """The job when it succeeded; JobFailed with its reason and message, or JobCancelled. Ctrl-C leaves it running.

    Of several at once each has a bar of its own among `bars`, and a `title`.
    """
    output = session.output
    try:
        with open_bars(output) if bars is None else nullcontext(bars) as shown:
            view = _JobView(output, shown, title or job.id)
            async for state in states(session, job):
                view.update(job := state)
            view.close()
    except asyncio.CancelledError:
        output.note(f"{job.id} goes on: `smelt jobs watch {job.id}` follows it, `smelt jobs cancel {job.id}` stops it")
        raise
    if job.state == job_pb2.JOB_STATE_FAILED:
        details = {**job.error.details, "job": job.id, "reason": job.error.reason}
        trace = f"`smelt jobs trace {job.id}` shows where"
        raise JobFailed(f"{job.error.reason}: {job.error.message}\n  {job.id}; {trace}", details=details)
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        raise JobCancelled(f"{job.id} was cancelled")
    return job


async def states(session: Session, job: job_pb2.Job) -> AsyncIterator[job_pb2.Job]:
    """Every state from `job` on to the last; an outage of the gateway is waited out for JOB_FOLLOW_OUTAGE_MAX_S."""
    yield job
    answered = time.monotonic()
    while job.state not in FINAL:
        try:
            async with aclosing(_watched(session, job.id)) as watched:
                async for job in watched:
                    answered = time.monotonic()
                    yield job
        except Unavailable:
            if time.monotonic() - answered > limits.JOB_FOLLOW_OUTAGE_MAX_S:
                raise
            await asyncio.sleep(limits.JOB_POLL_PERIOD_S)


async def _watched(session: Session, job_id: str) -> AsyncGenerator[job_pb2.Job]:
    """Changes as they come; the state that can be read now if watching is cut off, as by a proxy."""
    request = job_pb2.WatchJobRequest(id=job_id)
    try:
        async with session.stream(session.jobs.WatchJob, request, timeout_s=limits.CALL_TIMEOUT_MAX_S) as replies:
            async for reply in replies:
                yield reply.job
    except Unavailable:
        await asyncio.sleep(limits.JOB_POLL_PERIOD_S)
        yield (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=job_id))).job


@contextmanager
def open_bars(output: Output) -> Iterator[Progress]:
    """Bars of jobs on standard error, drawn if that is a terminal. One such block at a time."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    bars = Progress(*columns, TimeElapsedColumn(), console=output.err, transient=True)
    if output.err.is_terminal:
        bars.start()
    try:
        yield bars
    finally:
        if output.err.is_terminal:
            bars.stop()


class _JobView:
    """Progress of one job on standard error."""

    def __init__(self, output: Output, bars: Progress, title: str) -> None:
        self._output, self._bars, self._title = output, bars, title
        self._phase = ""
        self._told: set[str] = set()
        self._noted, self._noted_s = "", 0.0
        self._bar: TaskID | None = None

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None

    def update(self, job: job_pb2.Job) -> None:
        """Shows the present state, and each alert and what else happened once."""
        phase = _phase(job)
        for lines, tell in ((job.progress.notes, self._output.note), (job.progress.alerts, self._output.warn)):
            for line in lines:
                if line not in self._told:
                    self._told.add(line)
                    tell(f"{self._title}  {line}")
        if not self._output.err.is_terminal:
            self._note(job, phase)
            return
        total = job.progress.total or None
        if phase != self._phase or self._bar is None:
            self.close()
            self._bar = self._bars.add_task(self._described(phase, job), total=total, amount="")
        self._bars.update(self._bar, completed=job.progress.done, total=total, amount=_amount(job.progress))
        self._phase = phase

    def _described(self, phase: str, job: job_pb2.Job) -> str:
        return phase if self._title == job.id else f"{self._title}: {phase}"

    def _note(self, job: job_pb2.Job, phase: str) -> None:
        is_due = time.monotonic() - self._noted_s >= limits.PROGRESS_LINE_PERIOD_S
        amount = _amount(job.progress) if job.state in _TOLD else ""
        line = f"{self._title}  {phase}  {amount}".rstrip()
        if phase != self._phase or (is_due and amount and line != self._noted):
            self._output.note(line)
            self._phase, self._noted, self._noted_s = phase, line, time.monotonic()


def _phase(job: job_pb2.Job) -> str:
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    attempt = f" (attempt {job.attempt})" if job.attempt > 1 else ""
    running = job.state == job_pb2.JOB_STATE_RUNNING and job.progress.phase
    return f"{job.service} {job.kind}: {job.progress.phase if running else state}{attempt}"


def _amount(progress: job_pb2.Progress) -> str:
    if not progress.total:
        return progress.message
    if progress.unit == "bytes":
        return f"{human_bytes(progress.done)} of {human_bytes(progress.total)}"
    return f"{progress.done}/{progress.total} {progress.unit}  {progress.message}"
