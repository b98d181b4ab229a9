"""Jobs as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from smelt.job.v1 import job_pb2

from gateway.cli.documents import enum_word
from gateway.cli.follow import FINAL
from gateway.cli.output import facts, human_time, short_digest, table


def jobs_view(jobs: Iterable[job_pb2.Job]) -> RenderableType:
    """A line a job."""
    rows = (
        (
            job.id,
            job.service,
            job.kind,
            state_of(job),
            amount_of(job),
            _took(job),
            short_digest(job.result_digest),
        )
        for job in jobs
    )
    return table(("job", "service", "kind", "state", "progress", ">took", "result"), rows)


def job_view(job: job_pb2.Job) -> RenderableType:
    """Everything about one job."""
    return facts(
        [
            ("job", job.id),
            ("work", f"{job.service} {job.kind}"),
            ("state", state_of(job) + (" (cached)" if job.is_cached else "")),
            ("progress", amount_of(job)),
            ("now", "" if job.state in FINAL else job.progress.message),
            ("attempt", job.attempt),
            ("created", job.create_time.ToJsonString() if job.HasField("create_time") else ""),
            ("took", _took(job)),
            ("result", job.result_digest),
            ("error", f"{job.error.reason}: {job.error.message}" if job.error.reason else ""),
            ("trace", job.trace_id),
        ]
    )


def state_of(job: job_pb2.Job) -> str:
    """The state's short name."""
    return enum_word("JobState", job_pb2.JobState.Name(job.state))


def amount_of(job: job_pb2.Job) -> str:
    """How far a job is; of one that succeeded there is nothing left to say."""
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return ""
    progress = job.progress
    amount = f" {progress.done}/{progress.total} {progress.unit}" if progress.total else ""
    return f"{progress.phase}{amount}".strip()


def _took(job: job_pb2.Job) -> str:
    """Time from the job's creation to its last change; a dash for one that has not begun to change."""
    took_ns = job.update_time.ToNanoseconds() - job.create_time.ToNanoseconds()
    return human_time(took_ns / 1e9) if job.HasField("create_time") and took_ns > 0 else "-"
