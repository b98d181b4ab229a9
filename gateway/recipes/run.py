"""Runs the stages of a recipe: each as soon as what it needs is there, those that do not need each other at once.

What a stage makes is stored under its request, so a run that was cut off and begins again finds what is done; a job
that still works is followed, not started a second time. Where a stage fails, those that need it are not begun, and all
others go on to their end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from rich.progress import Progress
from smelt.job.v1 import job_pb2

from gateway.cli.follow import FINAL, finish, open_bars
from gateway.cli.output import human_time, short_digest
from gateway.recipes.kinds import Decision, DecisionKind, JobKind, Stage
from gateway.recipes.plan import asks, inputs_of, listed_jobs, pinned, request_of, stored, told
from gateway.recipes.schema import Recipe
from smeltkit.errors import GateFailed, SmeltError

if TYPE_CHECKING:
    from gateway.cli.session import Session


@dataclass(kw_only=True)
class Outcome:
    """How a stage ended."""

    stage: Stage
    state: str
    """succeeded, failed, or skipped where something that it needs did not succeed."""
    inputs: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    digest: str = ""
    """What it made."""
    job: job_pb2.Job | None = None
    decision: Decision | None = None
    error: SmeltError | None = None
    wall_s: float = 0.0

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.stage.name,
            "verb": self.stage.kind.verb,
            "state": self.state,
            "inputs": {key: list(digests) for key, digests in self.inputs.items()},
            "digest": self.digest or None,
            "gives": self.stage.gives or None,
            "job": self.job.id if self.job else None,
            "is_cached": self.job.is_cached if self.job else None,
            "found": self.decision.found if self.decision else None,
            "error": {"reason": self.error.reason(), "message": self.error.message} if self.error else None,
            "wall_s": round(self.wall_s, 3),
        }

    def line(self) -> str:
        """For people."""
        if self.error:
            return f"{self.stage.name}  {self.state}: {self.error.message}"
        how = "was stored" if self.job and self.job.is_cached else f"took {human_time(self.wall_s)}"
        what = self.decision.text if self.decision else short_digest(self.digest)
        return f"{self.stage.name}  {self.stage.kind.verb} {how}: {what}"


async def run_recipe(session: Session, recipe: Recipe) -> list[Outcome]:
    """Runs every stage of a recipe; their outcomes in order."""
    recipe = await pinned(session, recipe)
    with open_bars(session.output) as bars:
        running: dict[str, asyncio.Task[Outcome]] = {}

        async def begun(stage: Stage) -> Outcome:
            before = [await running[name] for name in stage.needs]
            outcome = await _after(session, recipe, stage, before, bars)
            session.output.note(outcome.line())
            return outcome

        async with asyncio.TaskGroup() as group:
            for stage in recipe.stages.values():
                running[stage.name] = group.create_task(begun(stage))
    return [running[name].result() for name in recipe.stages]


async def run_stage(session: Session, recipe: Recipe, name: str, made: Mapping[str, str]) -> Outcome:
    """Runs one stage, given what the stages that it takes something of have made."""
    stage = recipe.stages[name]
    recipe = await stored(session, recipe, stage)
    with open_bars(session.output) as bars:
        return await _outcome(session, recipe, stage, made, bars)


async def _after(session: Session, recipe: Recipe, stage: Stage, before: Sequence[Outcome], bars: Progress) -> Outcome:
    if wrong := [outcome.stage.name for outcome in before if outcome.state != "succeeded"]:
        error = GateFailed(f"it needs {', '.join(wrong)}, which did not succeed")
        return Outcome(stage=stage, state="skipped", error=error)
    return await _outcome(session, recipe, stage, {one.stage.name: one.digest for one in before}, bars)


async def _outcome(session: Session, recipe: Recipe, stage: Stage, made: Mapping[str, str], bars: Progress) -> Outcome:
    began = time.monotonic()
    found = Outcome(stage=stage, state="succeeded")
    try:
        found.inputs = await inputs_of(session, stage, made)
        await _do(session, recipe, found, bars)
    except SmeltError as error:
        found.state, found.error = "failed", error
    found.wall_s = time.monotonic() - began
    return found


async def _do(session: Session, recipe: Recipe, found: Outcome, bars: Progress) -> None:
    stage, inputs = found.stage, {key: [str(one) for one in digests] for key, digests in found.inputs.items()}
    kind = stage.kind
    if isinstance(kind, JobKind):
        spec = kind.spec(stage, inputs, recipe.files)
        with told(session, asks(stage)):
            begun = await _live(session, kind, spec) or await kind.job.start(session, spec)
        found.job = await finish(session, begun, bars, stage.name)
        found.digest = found.job.result_digest
    elif isinstance(kind, DecisionKind):
        found.decision = await kind.decide(session, stage, inputs)
        if not found.decision.is_met:
            raise GateFailed(f"{found.decision.text}: what is demanded is not met")


async def _live(session: Session, kind: JobKind, spec: Message) -> job_pb2.Job | None:
    """The newest job of the same request that is not over; None if there is none."""
    wanted = request_of(kind, spec)
    jobs = await listed_jobs(session, kind.job.service)
    return next((job for job in jobs if job.request_digest == wanted and job.state not in FINAL), None)
