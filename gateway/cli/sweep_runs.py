"""The runs of a sweep, done: all of them to their ends, or by successive halving. Each is a job of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smelt.artifact.v1 import artifact_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.documents import to_document
from gateway.cli.halving import Rung, beside, cut, stopped_text
from smeltkit.errors import JobCancelled, JobFailed
from smeltkit.ids import new_id

if TYPE_CHECKING:
    from gateway.cli.session import Session

HELDOUT_FILE: Final = "heldout.jsonl"
Spec = trainer_pb2.TrainSpec
Row = dict[str, Any]


async def run_all(session: Session, specs: Sequence[Spec]) -> list[Row]:
    """Starts every training and follows one after the other; a row each, without results where one failed.

    Beside the row of every other that came to its end stands by how much it is worse than the best.
    """
    rows = []
    for spec, ended in zip(specs, await _ends(session, specs), strict=True):
        row: Row = {"name": spec.name, "digest": None, "heldout": None, "run": None, **ended}
        if "error" not in row:
            row |= await result_of(session, row["digest"])
        rows.append(row)
    done = {row["name"]: row for row in rows if row["heldout"]}
    losses = {name: await heldout_losses(session, row["run"]["run_digest"]) for name, row in done.items()}
    if done:
        best = best_of(rows)["name"]
        for name, row in done.items():
            if name != best:
                row["beside_best"] = beside(losses[best], losses[name])
    return rows


async def run_halving(session: Session, specs: Sequence[Spec], rungs: Sequence[Rung]) -> list[Row]:
    """Takes all trainings to the first rung, the best of them to the next, and so on; a row each.

    One that is stopped has in its row `stopped`, the numbers that decided; what it did is stored, and so is not done
    again if the sweep is.
    """
    rows: dict[str, Row] = {spec.name: {"name": spec.name, "heldout": None, "run": None} for spec in specs}
    alive = list(specs)
    for number, rung in enumerate(rungs[:-1], start=1):
        losses = {}
        for spec, ended in zip(alive, await _ends(session, [_until(spec, rung.steps) for spec in alive]), strict=True):
            row = rows[spec.name]
            row |= {"rung": number, **ended}
            if "error" not in row:
                row |= await _paused(session, row["digest"])
                losses[spec.name] = await heldout_losses(session, row["digest"])
        if not losses:
            raise JobFailed(f"no run of the sweep reached rung {number}; `smelt jobs ls` tells why")
        for name, found in cut(losses, rung.kept).items():
            rows[name]["stopped"] = found
            session.output.note(stopped_text(name, rung.steps, found))
        alive = [spec for spec in alive if spec.name in losses and "stopped" not in rows[spec.name]]
    for row in await run_all(session, alive):
        reached = {"steps": rungs[-1].steps, "cost": row["run"]["outcome"]} if row["run"] else {}
        rows[row["name"]] |= {**row, **reached, "rung": len(rungs)}
    return list(rows.values())


async def result_of(session: Session, digest: str) -> Row:
    """What a training made and took."""
    artifact = await session.artifact(digest)
    lineage = json.loads(artifact.config_json)["lineage"]
    taken = (await session.call(session.trainer.GetRun, trainer_pb2.GetRunRequest(bundle=digest))).run
    return {"digest": digest, "heldout": lineage["parameters"].get("heldout"), "run": to_document(taken)}


def best_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row with the lowest held-out loss of those that came to their end; JobFailed if none did."""
    done = [row for row in rows if row["run"] and row["heldout"]]
    if not done:
        raise JobFailed("no run of the sweep came to its end; `smelt jobs ls` tells why")
    return min(done, key=lambda row: float(row["heldout"]["after"]))


async def heldout_losses(session: Session, digest: str) -> list[float]:
    """Loss of each held-out row of the weights that a record, or a paused run, is about."""
    from gateway.cli.downloads import download

    artifact = await session.artifact(digest)
    layer = layer_of(artifact, HELDOUT_FILE)
    assert layer is not None, "what was compared on held-out rows has their losses"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / HELDOUT_FILE
        await download(session, layer, path)
        measured = [json.loads(line) for line in path.read_text().splitlines()]
    best = json.loads(artifact.config_json).get("best")
    found = next(one for one in measured if one["step"] == best["step"]) if best else measured[-1]
    return list(map(float, found["losses"]))


def layer_of(artifact: artifact_pb2.Artifact, path: str) -> artifact_pb2.Descriptor | None:
    """The file of an artifact at `path`; None if it has none."""
    return next((layer for layer in artifact.layers if layer.path == path), None)


async def _ends(session: Session, specs: Sequence[Spec]) -> list[Row]:
    """Starts trainings and follows them; job, digest of the result or error of each."""
    jobs: list[job_pb2.Job] = []
    for spec in specs:
        request = trainer_pb2.StartTrainRequest(spec=spec, request_id=new_id("req"))
        jobs.append((await session.call(session.trainer.StartTrain, request)).job)
    found: list[Row] = []
    for job in jobs:
        try:
            found.append({"job": job.id, "digest": (await session.finish(job)).result_digest})
        except (JobFailed, JobCancelled) as error:
            found.append({"job": job.id, "error": error.message})
    return found


async def _paused(session: Session, digest: str) -> Row:
    artifact: artifact_pb2.Artifact = await session.artifact(digest)
    config = json.loads(artifact.config_json)
    return {"steps": config["step"], "heldout": config["heldout"], "cost": config["cost"]}


def _until(spec: Spec, steps: int) -> Spec:
    """The training, pausing after that many steps."""
    found = Spec()
    found.CopyFrom(spec)
    found.settings_json = json.dumps({**json.loads(spec.settings_json), "until_step": steps}, sort_keys=True)
    return found
