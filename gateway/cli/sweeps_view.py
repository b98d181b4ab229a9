"""A sweep as documents and tables: what its runs would take, and which of them was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.models_view import plan_document
from gateway.cli.output import facts, human_bytes, human_time, table
from gateway.cli.sweeps import Point


def sweep_document(
    points: Sequence[Point], specs: Sequence[trainer_pb2.TrainSpec], plans: Sequence[job_pb2.Plan]
) -> dict[str, Any]:
    """The plan of a sweep: that of every run, and all of their time; None where one is not known."""
    runs = [
        {"name": spec.name, "settings": point, "plan": plan_document(plan)}
        for point, spec, plan in zip(points, specs, plans, strict=True)
    ]
    return {"runs": runs, "time_s": _time_s(plans)}


def sweep_plan_view(
    points: Sequence[Point], specs: Sequence[trainer_pb2.TrainSpec], plans: Sequence[job_pb2.Plan]
) -> list[RenderableType]:
    """A line a run, then what the whole takes."""
    rows = [
        (
            spec.name,
            *(point.get(key, "") for key in points[0]),
            human_time(plan.time_s) if plan.time_s else "n/a",
            human_bytes(plan.memory_bytes),
            plan.cached_digest and "stored already",
            "; ".join(f"{refusal.reason}: {refusal.message}" for refusal in plan.refusals),
        )
        for point, spec, plan in zip(points, specs, plans, strict=True)
    ]
    time_s = _time_s(plans)
    whole = facts([("runs", len(plans)), ("time of all", human_time(time_s) if time_s is not None else "n/a")])
    return [table(("name", *points[0], ">time", ">memory", "", "refused because"), rows), whole]


def sweep_view(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[RenderableType]:
    """The runs, best first; those that failed last."""
    ordered = sorted(rows, key=lambda row: row["heldout"]["after"] if row["heldout"] else float("inf"))
    keys = list(rows[0]["settings"])
    lines = []
    for row in ordered:
        found, taken = row["heldout"], row["run"]
        result = (
            (f"{found['after']:.4f}", f"{found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]",
             human_time(taken["outcome"]["time_s"]))
            if found
            else ("-", row.get("error", "")[:80], "-")
        )  # fmt: skip
        lines.append((row["name"], *(row["settings"].get(key, "") for key in keys), *result))
    note = (
        f"best of {len(rows)} by held-out loss: {best['name']}. It was chosen by this very loss, so another set of rows"
        " is needed to say how much better it is."
    )
    return [table(("name", *keys, ">held-out loss", ">change [95 %]", ">time"), lines), note]


def _time_s(plans: Sequence[job_pb2.Plan]) -> float | None:
    times = [plan.time_s for plan in plans if not plan.cached_digest]
    return sum(times) if all(times) else None
