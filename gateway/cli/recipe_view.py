"""Recipes as tables: what each stage would do, what went into it, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType

from gateway.cli.output import facts, human_bytes, human_time, measured, short_digest, table
from gateway.recipes.kinds import Stage
from gateway.recipes.plan import Outlook, Outlooks
from gateway.recipes.run import Outcome

_UNKNOWN = "unknown"


def outlooks_view(found: Outlooks) -> list[RenderableType]:
    """A line a stage with what it would take, then the facts of each plan, then every refusal."""
    rows = (_planned(outlook) for outlook in found.stages.values())
    views: list[RenderableType] = [
        table(("stage", "verb", "state", ">stores", ">memory", ">time", "result or what it waits for"), rows)
    ]
    for outlook in found.stages.values():
        if outlook.plan and outlook.plan.items and not outlook.digest:
            items = ((item.name, item.value) for item in outlook.plan.items)
            views += ["", f"{outlook.stage.name} would {outlook.stage.kind.verb}", facts(items)]
    refusals = [(name, error.reason(), error.message) for name, one in found.stages.items() for error in one.refusals]
    return [*views, "", table(("refused", "because", ""), refusals)] if refusals else views


def edges_view(found: Outlooks) -> RenderableType:
    """A line an edge: every stage, what goes into it, and what it made."""
    rows = [
        (name if number == 0 else "", outlook.stage.kind.verb if number == 0 else "", key, source, taken,
         (short_digest(outlook.digest) or _UNKNOWN if outlook.stage.kind.makes else "-") if number == 0 else "")
        for name, outlook in found.stages.items()
        for number, (key, source, taken) in enumerate(_edges(outlook.stage, outlook.inputs))
    ]  # fmt: skip
    return table(("stage", "verb", "takes", "from", "digest", "makes"), rows)


def outcomes_view(found: Sequence[Outcome]) -> RenderableType:
    """A line a stage with how it ended."""
    rows = (
        (one.stage.name, one.stage.kind.verb, one.state, short_digest(one.digest) or "-",
         human_time(one.wall_s), "stored before" if one.job and one.job.is_cached else _said(one))
        for one in found
    )  # fmt: skip
    return table(("stage", "verb", "state", "made", ">time", ""), rows)


def _said(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.error.message
    return outcome.decision.text if outcome.decision else ""


def _planned(outlook: Outlook) -> tuple[object, ...]:
    plan, waits = outlook.plan, outlook.state == "waits"
    amounts: tuple[object, ...] = ("", "", "")
    if plan and not outlook.digest:
        amounts = (human_bytes(plan.write_bytes) if plan.write_bytes else _UNKNOWN,
                   human_bytes(plan.memory_bytes) if plan.memory_bytes else _UNKNOWN,
                   human_time(plan.time_s) if plan.time_s else _UNKNOWN)  # fmt: skip
    elif waits and outlook.stage.kind.makes:
        amounts = (_UNKNOWN,) * 3
    until = f"waits for {', '.join(outlook.stage.needs)}" if waits else ""
    return outlook.stage.name, outlook.stage.kind.verb, outlook.state, *amounts, short_digest(outlook.digest) or until


def _edges(stage: Stage, inputs: Mapping[str, Sequence[str | None]]) -> Iterator[tuple[str, str, object]]:
    if not stage.edges:
        yield "-", "", ""
    taken = {key: list(digests) for key, digests in inputs.items()}
    for edge in stage.edges:
        digest = taken[edge.key].pop(0)
        yield (
            edge.key,
            f"stage {edge.stage}" if edge.stage else edge.reference,
            (measured(short_digest(digest)) if digest else _UNKNOWN),
        )
