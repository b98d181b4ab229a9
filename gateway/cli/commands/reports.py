"""Commands about reports: report, results, compare, gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from smelt.evaluator.v1 import evaluator_pb2
from smelt.job.v1 import job_pb2

from gateway.cli.demands import check_demand, is_met
from gateway.cli.documents import to_document
from gateway.cli.options import Json
from gateway.cli.reports_view import (
    compare_view,
    gate_view,
    report_document,
    report_view,
    results_view,
    sample_document,
    samples_view,
)
from gateway.cli.runner import run
from smeltkit.errors import GateFailed, JobFailed, UnknownArtifact
from smeltkit.ids import digest_digits, is_digest

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(rich_markup_mode=None)
ReportReference = Annotated[str, typer.Argument(metavar="REPORT", help="Digest of a report, or the job that made it.")]


@app.command("report")
def report(
    reference: ReportReference,
    samples: Annotated[bool, typer.Option("--samples", help="List every sample too.")] = False,
    as_json: Json = False,
) -> None:
    """Shows a report."""

    async def work(session: Session) -> None:
        request = evaluator_pb2.GetReportRequest(digest=await _digest(session, reference), with_samples=samples)
        reply = await session.call(session.evaluator.GetReport, request)
        document = report_document(reply.report)
        if samples:
            document["samples"] = [sample_document(reply.report, sample) for sample in reply.samples]
        views = [samples_view(reply)] if samples else []
        session.output.show(document, *views, *report_view(reply.report))

    run("report", work, as_json=as_json)


@app.command("results")
def results(
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="At most this many.")] = 20,
    as_json: Json = False,
) -> None:
    """Lists finished evaluations, newest first."""

    async def work(session: Session) -> None:
        request = job_pb2.ListJobsRequest(service="evaluator", limit=1000)
        jobs = (await session.call(session.jobs.ListJobs, request)).jobs
        done = [job for job in jobs if job.kind == "evaluate" and job.result_digest][:limit]
        found = []
        for job in done:
            asked = evaluator_pb2.GetReportRequest(digest=job.result_digest)
            found.append((job.id, (await session.call(session.evaluator.GetReport, asked)).report))
        document = {"results": [{**report_document(report), "job": job_id} for job_id, report in found]}
        session.output.show(document, results_view(found))
        if not found:
            session.output.note("no finished evaluations; `smelt eval` makes one")

    run("results", work, as_json=as_json)


@app.command("compare")
def compare(
    baseline: Annotated[str, typer.Argument(metavar="BASELINE", help="Report compared against, or its job.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="Report compared, or its job.")],
    must: Annotated[
        str, typer.Option("--must", help="better or not-worse: end with 1 unless the paired test shows it.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Compares two reports of one suite, problem by problem."""

    async def work(session: Session) -> None:
        check_demand(must)
        request = evaluator_pb2.CompareRequest(
            baseline=await _digest(session, baseline), candidate=await _digest(session, candidate)
        )
        reply = await session.call(session.evaluator.Compare, request)
        session.output.show(to_document(reply), *compare_view(reply))
        if not is_met(must, reply):
            raise typer.Exit(GateFailed.exit_code)

    run("compare", work, as_json=as_json)


@app.command("gate")
def gate(
    reference: Annotated[str, typer.Argument(metavar="REF", help="The model that all clauses are about.")],
    clauses: Annotated[list[str], typer.Option("--clause", help='E.g. "humaneval pass@1 >= 0.5"; may be given again.')],
    reports: Annotated[
        list[str], typer.Option("--report", help="Report, or the job that made it; may be given again.")
    ],
    as_json: Json = False,
) -> None:
    """Checks conditions on reports of one model; ends with 1 if any is not met or not measured."""

    async def work(session: Session) -> None:
        bundle = await session.artifact(reference)
        digests = [await _digest(session, entry) for entry in reports]
        request = evaluator_pb2.CheckGateRequest(bundle_digest=bundle.digest, reports=digests, clauses=clauses)
        reply = await session.call(session.evaluator.CheckGate, request)
        session.output.show(to_document(reply), gate_view(reply))
        if not reply.is_met:
            raise typer.Exit(GateFailed.exit_code)

    run("gate", work, as_json=as_json)


async def _digest(session: Session, reference: str) -> str:
    """The report's digest: that of `reference`, or the result of the job that it names."""
    if is_digest(reference) or digest_digits(reference):
        return await session.whole(reference)
    if not reference.startswith("job-"):
        raise UnknownArtifact(
            f"{reference!r} is no report; give its digest, the first digits of it, or the job that made it; "
            "`smelt results` lists them"
        )
    job = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=reference))).job
    if job.error.reason:
        raise JobFailed(f"{job.error.reason}: {job.error.message}")
    if not job.result_digest:
        raise UnknownArtifact(f"{reference} has no report yet; `smelt jobs watch {reference}` follows it")
    return str(job.result_digest)
