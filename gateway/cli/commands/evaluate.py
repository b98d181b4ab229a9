"""Commands that score: eval, references, suites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from smelt.evaluator.v1 import evaluator_pb2

from gateway.cli.documents import to_document
from gateway.cli.models_view import show_plan
from gateway.cli.options import Data, Json, Plan, Reference, SuiteName, Wait
from gateway.cli.reports_view import (
    judgement_document,
    record_view,
    report_document,
    report_view,
    samples_view,
    suite_document,
    suites_view,
)
from gateway.cli.runner import run
from gateway.cli.verbs import EVALUATE
from smeltkit import limits
from smeltkit.ids import new_id

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(rich_markup_mode=None)


@app.command("eval")
def eval_(
    reference: Reference,
    suite: SuiteName,
    data: Data = "",
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=limits.EVALUATION_SAMPLES_MAX, help="Samples a problem.")
    ] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy and allows one sample only.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Share of probability kept.")] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=limits.SEED_MAX, help="Each sample's seed is derived from it.")
    ] = 0,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", min=0, max=limits.EVALUATION_TOKENS_MAX, help="Per completion; 0 for the suite's own."
        ),
    ] = 0,
    limit: Annotated[
        int,
        typer.Option("--limit", min=0, max=limits.SUITE_ROWS_MAX, help="Only the first n problems: a partial score."),
    ] = 0,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency", min=0, max=limits.EVALUATION_CONCURRENCY_MAX, help="Completions in flight; 0 to leave it."
        ),
    ] = 0,
    plan: Plan = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Scores a model on a suite, with a 95 % interval; equal requests give the stored result."""

    async def work(session: Session) -> None:
        spec = evaluator_pb2.EvaluationSpec(
            bundle=await session.whole(reference),
            suite=suite,
            data_digest=await _data_digest(session, suite, data),
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            limit=limit,
            concurrency=concurrency,
        )
        if plan:
            show_plan(session.output, await EVALUATE.plan(session, spec))
            return
        if not (job := await session.finish_or_show(await EVALUATE.start(session, spec), wait=wait)):
            return
        if job.is_cached:
            session.output.note("cached: this result was stored already")
        asked_report = evaluator_pb2.GetReportRequest(digest=job.result_digest)
        report = (await session.call(session.evaluator.GetReport, asked_report)).report
        document = {**report_document(report), "job": job.id, "is_cached": job.is_cached}
        session.output.show(document, *report_view(report))

    run("eval", work, as_json=as_json)


@app.command("judge")
def judge(
    suite: SuiteName,
    completions: Annotated[
        Path, typer.Option("--completions", metavar="FILE.jsonl", help="JSON lines with task_id and completion.")
    ],
    data: Data = "",
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Scores completions made elsewhere; several of one problem are its samples in order."""

    async def work(session: Session) -> None:
        spec = evaluator_pb2.JudgementSpec(
            suite=suite,
            data_digest=await _data_digest(session, suite, data),
            completions_digest=await _completions_digest(session, completions),
        )
        request = evaluator_pb2.StartJudgementRequest(spec=spec, request_id=new_id("req"))
        begun = (await session.call(session.evaluator.StartJudgement, request)).job
        if not (job := await session.finish_or_show(begun, wait=wait)):
            return
        asked = evaluator_pb2.GetReportRequest(digest=job.result_digest, with_samples=True)
        reply = await session.call(session.evaluator.GetReport, asked)
        document = {**judgement_document(reply), "job": job.id}
        if absent := document["without_completion"]:
            session.output.note(f"{absent} of {document['total']} problems have no completion; they count as failed")
        session.output.show(document, samples_view(reply), *report_view(reply.report))

    run("judge", work, as_json=as_json)


@app.command("references")
def references(suite: SuiteName, data: Data = "", wait: Wait = True, as_json: Json = False) -> None:
    """Judges a suite's reference solutions: what they give bounds what any score means."""

    async def work(session: Session) -> None:
        spec = evaluator_pb2.ReferenceSpec(suite=suite, data_digest=await _data_digest(session, suite, data))
        request = evaluator_pb2.StartReferenceCheckRequest(spec=spec, request_id=new_id("req"))
        begun = (await session.call(session.evaluator.StartReferenceCheck, request)).job
        if not (job := await session.finish_or_show(begun, wait=wait)):
            return
        record = await session.artifact(job.result_digest)
        session.output.show({"job": to_document(job), "record": to_document(record)}, record_view(record))

    run("references", work, as_json=as_json)


@app.command("suites")
def suites(as_json: Json = False) -> None:
    """Lists the benchmark suites of this release."""

    async def work(session: Session) -> None:
        reply = await session.call(session.evaluator.ListSuites, evaluator_pb2.ListSuitesRequest())
        session.output.show({"suites": [suite_document(suite) for suite in reply.suites]}, suites_view(reply.suites))

    run("suites", work, as_json=as_json)


async def _completions_digest(session: Session, file: Path) -> str:
    from gateway.cli.uploads import stored_file

    return await stored_file(session, file)


async def _data_digest(session: Session, suite: str, data: str) -> str:
    """Digest of the data at `data`, stored; empty if none was named: then the evaluator finds it."""
    if not data:
        return ""
    from gateway.cli.suite_data import stored_data

    return (await stored_data(session, suite, data)).digest
