"""Commands that train: plan, apply, watch, sweep; each from one YAML file. And archive, of what was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from smelt.artifact.v1 import artifact_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.halving import Rung, rungs_of
from gateway.cli.models_view import artifact_view, end_refused, plan_view
from gateway.cli.options import JobId, Json, Plan, Reference, Vram, Wait, WaitGpu
from gateway.cli.output import facts, human_bytes, parse_bytes
from gateway.cli.runner import run
from gateway.cli.sweep_runs import best_of, result_of, run_all, run_halving
from gateway.cli.sweeps import HALVING, points_of, run_of
from gateway.cli.sweeps_view import sweep_document, sweep_plan_view, sweep_view
from gateway.cli.training_file import read_file, specs_of, text_of, trainings
from gateway.cli.training_view import heldout_text, run_view
from smeltkit.errors import BadConfig, JobFailed, all_errors
from smeltkit.ids import check_name, new_id
from smeltkit.manifest import PAUSED_TYPE, TOGETHER_TYPE

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Plan, run and follow a training."
)
File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The training: base, data, name and settings.")]


@app.command("plan")
def plan(file: File, wait_gpu: WaitGpu = False, vram: Vram = "", as_json: Json = False) -> None:
    """Says what a training would do, cost and be refused for."""

    async def work(session: Session) -> None:
        first, *further = _on_gpus(await specs_of(session, file, trainings(read_file(file), file)), wait_gpu, vram)
        request = trainer_pb2.PlanTrainRequest(spec=first, together=further)
        reply = await session.call(session.trainer.PlanTrain, request)
        session.output.show(to_document(reply.plan), *plan_view(reply.plan))
        end_refused(reply.plan)

    run("train plan", work, as_json=as_json)


@app.command("apply")
def apply(file: File, wait: Wait = True, wait_gpu: WaitGpu = False, vram: Vram = "", as_json: Json = False) -> None:
    """Trains; the result is a complete bundle that was loaded and probed, or one for each of several adapters."""

    async def work(session: Session) -> None:
        first, *further = _on_gpus(await specs_of(session, file, trainings(read_file(file), file)), wait_gpu, vram)
        request = trainer_pb2.StartTrainRequest(spec=first, together=further, request_id=new_id("req"))
        await _show(session, (await session.call(session.trainer.StartTrain, request)).job, wait)

    run("train apply", work, as_json=as_json)


@app.command("watch")
def watch(job_id: JobId, as_json: Json = False) -> None:
    """Follows a training to its end."""

    async def work(session: Session) -> None:
        job = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=job_id))).job
        await _show(session, job, True)

    run("train watch", work, as_json=as_json)


@app.command("sweep")
def sweep(file: File, plan: Plan = False, vram: Vram = "", as_json: Json = False) -> None:
    """Trains every point of the file's `sweep`, planned as a whole first; the best by held-out loss gets the name.

    By `method: halving` the worse are stopped early. Its runs wait for each other's GPUs. Where one fails or is
    cancelled, nothing gets the name.
    """

    async def work(session: Session) -> None:
        value = read_file(file)
        if not value.get("heldout"):
            raise BadConfig(f"{file.name}: a sweep needs heldout; its runs are compared by their loss on it")
        if "adapters" in value:
            raise BadConfig(f"{file.name}: a sweep is of one training, adapters are several; remove one of both")
        points, name = points_of(value.get("sweep")), check_name(text_of(value, "name", file))
        found = [run_of(value, point, number) for number, point in enumerate(points, start=1)]
        specs = _on_gpus(await specs_of(session, file, found), True, vram)
        plans = [
            (await session.call(session.trainer.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec))).plan
            for spec in specs
        ]
        rungs = _rungs(value["sweep"], specs, plans)
        planned = sweep_document(points, specs, plans, rungs)
        if plan:
            session.output.show(planned, *sweep_plan_view(points, specs, plans, rungs))
            end_refused(*plans)
            return
        for spec, one in zip(specs, plans, strict=True):
            for refusal in one.refusals:
                raise all_errors()[refusal.reason](f"{spec.name}: {refusal.message}; nothing was started")
        rows = await (run_halving(session, specs, rungs) if rungs else run_all(session, specs))
        best, failed = best_of(rows), [row["name"] for row in rows if row.get("error")]
        if not failed:
            await session.call(session.artifacts.SetName, artifact_pb2.SetNameRequest(name=name, digest=best["digest"]))
        for row, point in zip(rows, points, strict=True):
            row["settings"] = point
        document = {"runs": rows, "best": best["name"], "name": None if failed else name, "rungs": planned["rungs"]}
        session.output.show(document, *sweep_view(rows, best))
        if failed:
            session.output.note(
                f"{name} is not named, since {', '.join(failed)} did not come to an end; start the sweep again, which"
                " takes what is stored"
            )
            raise typer.Exit(JobFailed.exit_code)

    run("train sweep", work, as_json=as_json)


@app.command("archive")
def archive(
    reference: Reference,
    target: Annotated[Path, typer.Argument(metavar="FILE.tar", help="Where to write it; must not exist.")],
    as_json: Json = False,
) -> None:
    """Writes a trained model, its record and every step to one tar file that needs no platform."""
    from gateway.cli.archives import write_archive
    from gateway.cli.commands.runs import find_run

    async def work(session: Session) -> None:
        found = await find_run(session, reference)
        bundle = await session.artifact(found.subject)
        document = await write_archive(session, bundle, found, target)
        shown = facts([("archive", document["path"]), ("size", human_bytes(document["size_bytes"])),
                       ("files", len(document["files"])), ("digest", document["digest"])])  # fmt: skip
        session.output.show(document, shown)

    run("train archive", work, as_json=as_json)


async def _show(session: Session, begun: job_pb2.Job, wait: bool) -> None:
    if not (job := await session.finish_or_show(begun, wait=wait)):
        return
    if job.is_cached:
        session.output.note("cached: this result was stored already")
    artifact = await session.artifact(job.result_digest)
    document, views = {"job": to_document(job), "artifact": to_document(artifact)}, list[Any]()
    if artifact.artifact_type == TOGETHER_TYPE:
        results = {}
        for name, digest in json.loads(artifact.config_json)["bundles"].items():
            results[name], shown = await _made(session, await session.artifact(digest))
            views += [facts([("name", name)]), *shown]
        session.output.show({**document, "results": results}, *views)
        return
    found, views = await _made(session, artifact)
    found.pop("digest")
    session.output.show({**document, **found}, *views)


async def _made(session: Session, artifact: artifact_pb2.Artifact) -> tuple[dict[str, Any], list[Any]]:
    """What a training stored, a bundle or where it paused: as a document, and for people."""
    if artifact.artifact_type == PAUSED_TYPE:
        paused = {"digest": artifact.digest, **json.loads(artifact.config_json)}
        return paused, [
            facts([("paused", f"after step {paused['step']}"), ("state", artifact.digest),
                   ("size", human_bytes(artifact.size_bytes)), *_heldout(paused)])
        ]  # fmt: skip
    found = await result_of(session, artifact.digest)
    return found, [artifact_view(artifact), facts(_heldout(found)), run_view(found["run"])]


def _rungs(sweep: Any, specs: Sequence[trainer_pb2.TrainSpec], plans: Sequence[job_pb2.Plan]) -> list[Rung]:
    """Where runs are stopped, none but of halving; BadConfig if they do not all have the same steps."""
    for spec in specs:
        if json.loads(spec.settings_json).get("until_step"):
            raise BadConfig(
                f"{spec.name}: until_step has no place in a sweep, whose runs pause by themselves; remove it"
            )
    if sweep.get("method") != HALVING or any(plan.refusals for plan in plans):
        return []
    steps = {spec.name: plan.counts["steps"] for spec, plan in zip(specs, plans, strict=True)}
    least, most = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    if steps[least] != steps[most]:
        raise BadConfig(
            f"halving compares runs after equal steps, but {least} has {steps[least]} and {most} {steps[most]}; set"
            " max_steps, or take the keys that differ out of the sweep"
        )
    return rungs_of(sweep, len(plans), steps[most])


def _on_gpus(specs: list[trainer_pb2.TrainSpec], waits: bool, vram: str) -> list[trainer_pb2.TrainSpec]:
    """The trainings with what they may take of GPUs, where anything is said of that."""
    terms = trainer_pb2.GpuTerms(waits=waits, memory_bytes=parse_bytes(vram, "--vram") if vram else 0)
    for spec in specs if waits or vram else []:
        spec.gpu.CopyFrom(terms)
    return specs


def _heldout(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [("held-out loss", heldout_text(found["heldout"]))] if found["heldout"] else []
