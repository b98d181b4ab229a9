"""Commands about runs, the records of trainings: ls, show, diff."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from smelt.artifact.v1 import artifact_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.curves import curves_document, curves_view
from gateway.cli.options import Json
from gateway.cli.output import short_digest
from gateway.cli.runner import run
from gateway.cli.runs_view import diff_document, diff_views, run_document, run_views, runs_view
from gateway.cli.sweep_runs import HELDOUT_FILE, heldout_losses, layer_of
from gateway.cli.training_view import heldout_text
from smeltkit import limits
from smeltkit.errors import UnknownArtifact
from smeltkit.manifest import BUNDLE_TYPE, RUN_TYPE
from smeltkit.paired import compare

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Show and compare trainings.")
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's digest, or a model that a training made.")]
_METRICS = "metrics.jsonl"


@app.command("ls")
def ls(
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=limits.RUNS_LISTED_MAX, help="At most this many.")
    ] = limits.RUNS_LISTED,
    as_json: Json = False,
) -> None:
    """Lists finished trainings, newest first."""

    async def work(session: Session) -> None:
        reply = await session.call(session.trainer.ListRuns, trainer_pb2.ListRunsRequest(limit=limit))
        found = [run_document(artifact) for artifact in reply.runs]
        session.output.show({"runs": found}, runs_view(found))
        if not found:
            session.output.note("no finished trainings; `smelt train apply` makes one, `smelt jobs ls` shows what runs")

    run("runs ls", work, as_json=as_json)


@app.command("show")
def show(reference: Run, as_json: Json = False) -> None:
    """Shows what went into a training, the course of its loss, and what it took."""

    async def work(session: Session) -> None:
        found = await find_run(session, reference)
        curve = await _curve(session, found)
        document = run_document(found)
        session.output.show({**document, "curve": curve}, *run_views(document, curve))

    run("runs show", work, as_json=as_json)


@app.command("diff")
def diff(
    one: Run,
    other: Annotated[str, typer.Argument(metavar="RUN", help="The run compared with it.")],
    as_json: Json = False,
) -> None:
    """Shows where two trainings differ: settings, data, code, device, the course of the loss, and what came of them."""

    async def work(session: Session) -> None:
        records = [await find_run(session, reference) for reference in (one, other)]
        found = [run_document(record) for record in records]
        curves = curves_document([await _curve(session, record) for record in records])
        document = {**diff_document(*found), "curves": curves, "heldout_difference": None}
        views = diff_views(*found)
        is_paired = all(layer_of(record, HELDOUT_FILE) for record in records)
        if document["is_same_heldout_data"] and is_paired:
            losses = [await heldout_losses(session, record.digest) for record in records]
            document["heldout_difference"] = asdict(compare(*losses))
            views.append(f"held-out loss, from the first to the second: {heldout_text(document['heldout_difference'])}")
        names = [run.get("name") or short_digest(run["digest"]) for run in found]
        session.output.show(document, curves_view(names, curves), "", *views)

    run("runs diff", work, as_json=as_json)


async def find_run(session: Session, reference: str) -> artifact_pb2.Artifact:
    """The run of that digest, or the newest that made that model; UnknownArtifact."""
    artifact = await session.artifact(reference)
    if artifact.artifact_type == BUNDLE_TYPE:
        asked = trainer_pb2.GetRunRequest(bundle=artifact.digest)
        artifact = await session.artifact((await session.call(session.trainer.GetRun, asked)).run.run_digest)
    if artifact.artifact_type != RUN_TYPE:
        raise UnknownArtifact(f"{reference!r} is neither a run nor a model; `smelt runs ls` lists the runs")
    return artifact


async def _curve(session: Session, found: artifact_pb2.Artifact) -> list[dict[str, Any]]:
    """Every step of a run, without the numbers of its samples."""
    from gateway.cli.downloads import download

    layer = layer_of(found, _METRICS)
    assert layer is not None, "every record has its steps"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _METRICS
        await download(session, layer, path)
        steps = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in step.items() if key != "sample_ids"} for step in steps]
