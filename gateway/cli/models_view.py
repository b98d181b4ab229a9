"""Plans, models and checks as tables."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import RenderableType
from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from gateway.cli.documents import to_document
from gateway.cli.output import Output, facts, human_bytes, human_time, short_digest, table
from smeltkit.errors import all_errors


def plan_document(plan: job_pb2.Plan) -> dict[str, Any]:
    """A plan for machines; an amount that nobody could forecast is None, not 0."""
    document = to_document(plan)
    return document | {name: document[name] or None for name in ("read_bytes", "write_bytes", "memory_bytes", "time_s")}


def show_plan(output: Output, plan: job_pb2.Plan) -> None:
    """Shows `plan` and ends the command as the verb itself would have ended: a refused plan is no success."""
    output.show(plan_document(plan), *plan_view(plan))
    end_refused(plan)


def end_refused(*plans: job_pb2.Plan) -> None:
    """Ends the command with the exit code of the first refusal, if there is any."""
    for refusal in (refusal for plan in plans for refusal in plan.refusals):
        raise typer.Exit(all_errors()[refusal.reason].exit_code)


def plan_view(plan: job_pb2.Plan) -> list[RenderableType]:
    """What would happen, and why it would be refused."""
    known = facts(
        [
            ("reads", human_bytes(plan.read_bytes) if plan.read_bytes else ""),
            ("stores", human_bytes(plan.write_bytes) if plan.write_bytes else ""),
            ("memory", human_bytes(plan.memory_bytes) if plan.memory_bytes else ""),
            ("time", human_time(plan.time_s) if plan.time_s else ""),
            ("already stored", plan.cached_digest),
            *((item.name, item.value) for item in plan.items),
        ]
    )
    steps = facts((f"step {number}", step) for number, step in enumerate(plan.steps, start=1))
    refusals = table(("refused because", ""), ((refusal.reason, refusal.message) for refusal in plan.refusals))
    return [view for view in (known, steps, refusals) if view.row_count]


def artifact_view(artifact: artifact_pb2.Artifact) -> RenderableType:
    """A stored bundle in a few lines."""
    config: dict[str, Any] = json.loads(artifact.config_json or "{}")
    return facts(
        [
            ("digest", artifact.digest),
            ("size", human_bytes(artifact.size_bytes)),
            ("files", len(artifact.layers)),
            ("format", config.get("format", "")),
            ("scheme", config.get("scheme", "")),
            ("licence", config.get("licence", "")),
        ]
    )


def check_view(report: artifact_pb2.Artifact) -> list[RenderableType]:
    """What a check found, a line each."""
    config: dict[str, Any] = json.loads(report.config_json or "{}")
    found = [(entry["check"], entry["found"]) for entry in config.pop("checks", [])]
    known = ((key, _compact(value)) for key, value in sorted(config.items()))
    return [facts(found), facts([("report", report.digest), *known])]


def inspect_view(answer: importer_pb2.InspectResponse, *, with_tensors: bool) -> list[RenderableType]:
    """Everything about a bundle: facts, architecture, contract, lineage, files, and its tensors if asked for."""
    config: dict[str, Any] = json.loads(answer.artifact.config_json or "{}")
    views: list[RenderableType] = [artifact_view(answer.artifact), facts([("parameters", f"{answer.parameters:,}")])]
    for section in ("config", "architecture", "contract", "lineage"):
        if isinstance(value := config.get(section), dict):
            views += ["", section, facts((key, _compact(item)) for key, item in sorted(value.items()))]
    files = (
        (layer.path, human_bytes(layer.size_bytes), short_digest(layer.digest)) for layer in answer.artifact.layers
    )
    views += ["", table(("file", ">size", "digest"), files)]
    if with_tensors:
        rows = (
            (tensor.name, tensor.dtype, "x".join(map(str, tensor.shape)), human_bytes(tensor.size_bytes))
            for tensor in answer.tensors
        )
        views += ["", table(("tensor", "type", ">shape", ">size"), rows)]
    if answer.rendered_example:
        views += ["", "one user message, rendered:", answer.rendered_example]
    return views


def names_view(names: list[artifact_pb2.Name]) -> RenderableType:
    """The catalogue."""
    rows = ((name.name, human_bytes(name.size_bytes), short_digest(name.digest)) for name in names)
    return table(("name", ">size", "digest"), rows)


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
