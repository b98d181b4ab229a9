"""A sweep as documents and tables: what its runs would take, and which of them was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.halving import Cost, Rung, cost_of
from gateway.cli.models_view import plan_document
from gateway.cli.output import facts, human_bytes, human_time, table
from gateway.cli.sweeps import Point


def sweep_document(
    points: Sequence[Point],
    specs: Sequence[trainer_pb2.TrainSpec],
    plans: Sequence[job_pb2.Plan],
    rungs: Sequence[Rung] = (),
) -> dict[str, Any]:
    """The plan of a sweep: that of every run, its rungs if it has some, and what all take; None where not known."""
    runs = [
        {"name": spec.name, "settings": point, "plan": plan_document(plan)}
        for point, spec, plan in zip(points, specs, plans, strict=True)
    ]
    cost = asdict(_cost(plans, rungs)) if rungs else None
    time_s = cost["time_s"] if cost else _time_s(plans)
    return {"runs": runs, "rungs": [asdict(rung) for rung in rungs], "cost": cost, "time_s": time_s}


def sweep_plan_view(
    points: Sequence[Point],
    specs: Sequence[trainer_pb2.TrainSpec],
    plans: Sequence[job_pb2.Plan],
    rungs: Sequence[Rung] = (),
) -> list[RenderableType]:
    """A line a run, then what the whole takes."""
    rows = [
        (
            spec.name,
            *(point.get(key, "") for key in points[0]),
            _time(plan.time_s),
            human_bytes(plan.memory_bytes),
            _stored(plan),
            "; ".join(f"{refusal.reason}: {refusal.message}" for refusal in plan.refusals),
        )
        for point, spec, plan in zip(points, specs, plans, strict=True)
    ]
    runs = table(("name", *points[0], ">time", ">memory", "", "refused because"), rows)
    if not rungs:
        return [runs, facts([("runs", len(plans)), ("time of all", _time(_time_s(plans)))])]
    cost = _cost(plans, rungs)
    rung_rows = [(number, rung.runs, rung.steps, rung.kept) for number, rung in enumerate(rungs, start=1)]
    all_steps = len(plans) * rungs[-1].steps
    whole = facts(
        [
            ("steps", f"{cost.steps:,}, {cost.steps / all_steps:.0%} of those of all runs to their ends"),
            ("tokens", f"{cost.tokens:,}, about"),
            ("time of all", f"{_time(cost.time_s)}, of steps alone; what is stored is not done again"),
        ]
    )
    return [runs, table((">rung", ">runs", ">after steps", ">go on"), rung_rows), whole]


def sweep_view(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[RenderableType]:
    """The runs, best first; those that were stopped after those that were not, those that failed last."""
    is_halved = any("rung" in row for row in rows)
    ordered = sorted(rows, key=lambda row: (bool(row.get("error")), -row.get("rung", 0), _after(row)))
    keys = list(rows[0]["settings"])
    lines = []
    for row in ordered:
        rung = (row.get("rung", "-"), row.get("steps", "-")) if is_halved else ()
        lines.append((row["name"], *(row["settings"].get(key, "") for key in keys), *rung, *_result(row)))
    rungs = (">rung", ">steps") if is_halved else ()
    columns = ("name", *keys, *rungs, ">held-out loss", ">change [95 %]", ">worse by [95 %]", ">time", "")
    views: list[RenderableType] = [table(columns, lines)]
    if is_halved:
        costs = [row["cost"] for row in rows if row.get("cost")]
        steps = sum(row.get("steps", 0) for row in rows)
        tokens, time_s = (sum(cost[key] for cost in costs) for key in ("tokens", "time_s"))
        views.append(facts([("steps", f"{steps:,}"), ("tokens", f"{tokens:,}"), ("time", human_time(time_s))]))
    ended = sum(not row.get("error") for row in rows)
    among = f"{len(rows)}" if ended == len(rows) else f"{ended} of {len(rows)}"
    views.append(
        f"best of {among} by held-out loss: {best['name']}. It was chosen by this very loss, so another set of rows"
        " is needed to say how much better it is."
    )
    close = [row["name"] for row in ordered if row.get("beside_best", {}).get("is_noise")]
    if close:
        views.append(f"within noise of it: {', '.join(close)}")
    return views


def _result(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Loss, its change, the distance to what was better, time and what became of a run."""
    if row.get("error") or not row["heldout"]:
        return ("-", "-", "-", "-", str(row.get("error", ""))[:80])
    found, stopped = row["heldout"], row.get("stopped")
    other = stopped or row.get("beside_best")
    cost = row.get("cost") or row["run"]["outcome"]
    noise = ", within noise" if stopped and stopped["is_noise"] else ""
    return (
        f"{found['after']:.4f}",
        _interval(found),
        _interval(other) if other else "",
        human_time(cost["time_s"]),
        f"stopped beside {stopped['against']}{noise}" if stopped else "",
    )


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['change']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _after(row: Mapping[str, Any]) -> float:
    return float(row["heldout"]["after"]) if row["heldout"] else float("inf")


def _cost(plans: Sequence[job_pb2.Plan], rungs: Sequence[Rung]) -> Cost:
    """What the rungs take, by the whole time of each run: a plan tells that of what is not stored."""
    times_s = [
        plan.time_s * plan.counts["steps"] / (plan.counts["steps"] - plan.counts.get("steps_stored", 0))
        for plan in plans
        if plan.time_s
    ]
    return cost_of(rungs, [plan.counts["tokens"] for plan in plans], times_s)


def _stored(plan: job_pb2.Plan) -> str:
    if plan.cached_digest:
        return "stored already"
    steps = plan.counts.get("steps_stored", 0)
    return f"stored until step {steps}" if steps else ""


def _time(time_s: float | None) -> str:
    return human_time(time_s) if time_s else "n/a"


def _time_s(plans: Sequence[job_pb2.Plan]) -> float | None:
    times = [plan.time_s for plan in plans if not plan.cached_digest]
    return sum(times) if all(times) else None
