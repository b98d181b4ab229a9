"""What the platform does right now, as a document and as a page: running jobs, their course and alerts, the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.gpus_view import gpus_view
from gateway.cli.jobs_view import amount_of, state_of
from gateway.cli.output import human_bytes, measured, table
from gateway.cli.runs_view import sparkline

ALIVE: Final = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_CANCELLING)
_ALERTS_SHOWN: Final = 8
_CURVE_WIDTH: Final = 32


def monitor_document(jobs: Sequence[job_pb2.Job], gpus: trainer_pb2.ListGpusResponse, at: str) -> dict[str, Any]:
    """One moment, for machines: `at` in UTC, jobs that are not over, GPUs and their leases."""
    return {"at": at, "jobs": [to_document(job) for job in jobs], **to_document(gpus)}


def monitor_view(jobs: Sequence[job_pb2.Job], gpus: trainer_pb2.ListGpusResponse, at: str) -> RenderableType:
    """One moment, for people."""
    columns = ("job", "work", "state", "progress", "loss", ">now", ">held-out", ">tokens/s", ">memory", ">MFU")
    views: list[RenderableType] = [Text(at, style="dim"), table(columns, map(_row, jobs))]
    alerts = [(job.id, text) for job in jobs for text in job.progress.alerts]
    if alerts:
        shown = [Text(f"{id}  {text}", style="bold red") for id, text in alerts[-_ALERTS_SHOWN:]]
        views += ["", Text("alerts", style="bold"), *shown]
    if gpus.gpus or gpus.leases:
        views += ["", *gpus_view(gpus)]
    return Group(*views)


def _row(job: job_pb2.Job) -> tuple[object, ...]:
    known = job.progress.measured
    return (
        job.id,
        f"{job.service} {job.kind}",
        state_of(job),
        amount_of(job),
        sparkline(job.progress.course, _CURVE_WIDTH),
        _number(known.get("loss"), ".4f"),
        _number(known.get("heldout"), ".4f"),
        _number(known.get("tokens_per_second"), ",.0f"),
        measured(human_bytes(known["memory_bytes"]) if "memory_bytes" in known else None),
        _number(known.get("mfu"), ".1%"),
    )


def _number(value: float | None, form: str) -> object:
    return measured(None if value is None else format(value, form))
