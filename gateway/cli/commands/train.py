"""Commands that train: plan, apply, watch; each from one YAML file.

base: ore-11m                 # model to start from
data: instruct.jsonl          # training rows, beside this file
heldout: heldout.jsonl        # optional: rows that only measure
name: ore-11m:refined         # name for the result
method: lora                  # and every other setting of a training
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.models_view import artifact_view, plan_view
from gateway.cli.options import JobId, Json, Wait
from gateway.cli.output import facts
from gateway.cli.runner import run
from gateway.cli.training_view import run_view
from smeltkit import limits
from smeltkit.errors import BadConfig, UnknownSource
from smeltkit.ids import check_name, new_id

if TYPE_CHECKING:
    from smelt.job.v1 import job_pb2

    from gateway.cli.session import Session

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Plan, run and follow a training."
)
File = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The training: base, data, name and settings.")]
_OWN_KEYS = ("base", "data", "heldout", "name")


@app.command("plan")
def plan(file: File, as_json: Json = False) -> None:
    """Says what a training would do, cost and be refused for."""

    async def work(session: Session) -> None:
        spec = await _spec(session, file)
        reply = await session.call(session.trainer.PlanTrain, trainer_pb2.PlanTrainRequest(spec=spec))
        session.output.show(to_document(reply.plan), *plan_view(reply.plan))

    run("train plan", work, as_json=as_json)


@app.command("apply")
def apply(file: File, wait: Wait = True, as_json: Json = False) -> None:
    """Trains; the result is a complete bundle that was loaded and probed."""

    async def work(session: Session) -> None:
        request = trainer_pb2.StartTrainRequest(spec=await _spec(session, file), request_id=new_id("req"))
        await _show(session, (await session.call(session.trainer.StartTrain, request)).job, wait)

    run("train apply", work, as_json=as_json)


@app.command("watch")
def watch(job_id: JobId, as_json: Json = False) -> None:
    """Follows a training to its end."""
    from smelt.job.v1 import job_pb2

    async def work(session: Session) -> None:
        job = (await session.call(session.jobs.GetJob, job_pb2.GetJobRequest(id=job_id))).job
        await _show(session, job, True)

    run("train watch", work, as_json=as_json)


async def _show(session: Session, job: job_pb2.Job, wait: bool) -> None:
    if not wait:
        session.output.show(to_document(job), job.id)
        return
    job = await session.finish(job)
    artifact = await session.artifact(job.result_digest)
    if job.is_cached:
        session.output.note("cached: this result was stored already")
    config: dict[str, Any] = json.loads(artifact.config_json)
    found = config["lineage"]["parameters"].get("heldout")
    asked = trainer_pb2.GetRunRequest(bundle=job.result_digest)
    taken = (await session.call(session.trainer.GetRun, asked)).run
    views = [artifact_view(artifact), *([_heldout_view(found)] if found else []), run_view(taken)]
    document = {"job": to_document(job), "artifact": to_document(artifact), "heldout": found, "run": to_document(taken)}
    session.output.show(document, *views)


def _heldout_view(found: dict[str, Any]) -> Any:
    change = f"{found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] over {found['rows']} rows"
    judged = "better" if found["high"] < 0 else "worse" if found["low"] > 0 else "no difference shown"
    return facts(
        [("held-out loss", f"{found['before']:.4f} -> {found['after']:.4f}"), ("change", f"{change}: {judged}")]
    )


async def _spec(session: Session, file: Path) -> trainer_pb2.TrainSpec:
    """The training that the file describes, its data stored."""
    from gateway.cli.uploads import upload

    value = _read(file)
    missing = [key for key in ("base", "data", "name") if not isinstance(value.get(key), str)]
    if missing:
        raise BadConfig(f"{file.name}: {missing[0]} is missing, or no text")
    paths = [file.parent / str(value[key]) for key in ("data", "heldout") if value.get(key)]
    for path in paths:
        if not path.is_file():
            raise UnknownSource(f"{path} does not exist; {file.name} names its data relative to its own folder")
    files = await upload(session, paths)
    settings = {key: item for key, item in value.items() if key not in _OWN_KEYS}
    methods = {
        "lora": trainer_pb2.METHOD_LORA,
        "qlora": trainer_pb2.METHOD_QLORA,
        "full": trainer_pb2.METHOD_FULL,
        "pretrain": trainer_pb2.METHOD_PRETRAIN,
    }
    return trainer_pb2.TrainSpec(
        base=value["base"],
        method=methods.get(str(settings.get("method", "lora")), trainer_pb2.METHOD_UNSPECIFIED),
        datasets=[entry.digest for entry in files],
        settings_json=json.dumps(settings, sort_keys=True),
        name=check_name(value["name"]),
    )


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        with file.open("rb") as opened:
            data = opened.read(limits.TRAIN_SETTINGS_MAX_BYTES + 1)
        value = yaml.safe_load(data[: limits.TRAIN_SETTINGS_MAX_BYTES])
    except OSError as error:
        raise UnknownSource(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise BadConfig(f"{file.name} is no YAML: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadConfig(f"{file.name} must hold keys such as base, data, name and method")
    return value
