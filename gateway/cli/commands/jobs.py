"""Commands about jobs: list, look at, follow, cancel, trace."""

from __future__ import annotations

import enum
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from smelt.job.v1 import job_pb2

from gateway.cli.costs_view import costs_view
from gateway.cli.documents import to_document
from gateway.cli.jobs_view import job_view, jobs_view
from gateway.cli.options import JobId, Json
from gateway.cli.prices import PriceConfig
from gateway.cli.runner import run
from smeltkit.config import environment, from_environment, smelt_home
from smeltkit.errors import BadRequest, UnknownJob

if TYPE_CHECKING:
    from gateway.cli.session import Session

_TRACE_ID = re.compile(r"[0-9a-f]{32}")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="List, follow, cancel and trace jobs."
)


@app.command("ls")
def list_(
    service: Annotated[str, typer.Option("--service", help="Only jobs of this service.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most this many.")] = 20,
    as_json: Json = False,
) -> None:
    """Lists jobs, newest first."""

    async def work(session: Session) -> None:
        from gateway.stack.state import SERVICES

        if service and service not in SERVICES:
            raise BadRequest(f"--service {service}: there is no such service; there are {', '.join(SERVICES)}")
        reply = await session.call(session.jobs.ListJobs, job_pb2.ListJobsRequest(service=service, limit=limit))
        session.output.show({"jobs": [to_document(job) for job in reply.jobs]}, jobs_view(reply.jobs))

    run("jobs ls", work, as_json=as_json)


class By(enum.StrEnum):
    """What costs are summed over."""

    JOB = "job"
    KIND = "kind"
    TENANT = "tenant"


@app.command("cost")
def cost(
    by: Annotated[By, typer.Option("--by", help="A line a job, or sums.")] = By.JOB,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most this many jobs, the newest.")] = 100,
    as_json: Json = False,
) -> None:
    """Shows what jobs took: time, GPU time, tokens, bytes; and what that costs at the prices of SMELT_PRICE_*."""

    async def work(session: Session) -> None:
        from gateway.cli.costs import gathered, together, total

        prices = from_environment(PriceConfig, "SMELT_PRICE_")
        reply = await session.call(session.jobs.ListJobs, job_pb2.ListJobsRequest(limit=limit))
        costs = await gathered(session, reply.jobs)
        shown = costs if by is By.JOB else together(costs, by.value)
        document = {
            "prices": asdict(prices),
            "costs": [one.document(prices) for one in shown],
            "total": total(costs).document(prices),
        }
        session.output.show(document, costs_view([*shown, total(costs)], prices))
        if not prices.is_set:
            session.output.note(
                "nothing has a price: SMELT_PRICE_* is not set where this command runs (`smelt config explain price`);"
                " whoever works the platform knows what to set"
            )

    run("jobs cost", work, as_json=as_json)


@app.command("get")
def get(job_id: JobId, as_json: Json = False) -> None:
    """Shows a job as it is now."""

    async def work(session: Session) -> None:
        job = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=job_id))).job
        session.output.show(to_document(job), job_view(job))

    run("jobs get", work, as_json=as_json)


@app.command("watch")
def watch(job_id: JobId, as_json: Json = False) -> None:
    """Follows a job to its end; fails if the job fails."""

    async def work(session: Session) -> None:
        job = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=job_id))).job
        job = await session.finish(job)
        session.output.show(to_document(job), job_view(job))

    run("jobs watch", work, as_json=as_json)


@app.command("cancel")
def cancel(job_id: JobId, as_json: Json = False) -> None:
    """Asks a job to stop; asking again does no harm."""

    async def work(session: Session) -> None:
        job = (await session.call(session.jobs.CancelJob, job_pb2.CancelJobRequest(id=job_id))).job
        session.output.show(to_document(job), job_view(job))

    run("jobs cancel", work, as_json=as_json)


@app.command("trace")
def trace(
    reference: Annotated[str, typer.Argument(metavar="ID", help="Id of a job, or a trace id of 32 hex digits.")],
    depth: Annotated[int, typer.Option("--depth", min=1, help="Draw at most this many levels.")] = 32,
    as_json: Json = False,
) -> None:
    """Draws what a job did, across all processes of this machine."""

    async def work(session: Session) -> None:
        from gateway.cli.trace_view import trace_document, trace_tree
        from smeltkit.telemetry import read_spans

        trace_id = reference
        if not _TRACE_ID.fullmatch(reference):
            trace_id = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=reference))).job.trace_id
        folder = Path(environment().get("SMELT_TELEMETRY_TRACE_DIR") or smelt_home() / "traces")
        spans = read_spans(folder, trace_id) if trace_id else []
        if not spans:
            raise UnknownJob(
                f"no spans of {reference} (trace {trace_id or 'none'}) in {folder}; it may have run elsewhere"
            )
        session.output.show(trace_document(trace_id, spans), trace_tree(spans, depth))

    run("jobs trace", work, as_json=as_json)
