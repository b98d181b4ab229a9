"""What a recipe would do, and what of it is there already: found out stage by stage, without starting anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smelt.job.v1 import job_pb2

from gateway.cli.models_view import plan_document
from gateway.recipes.kinds import Inputs, JobKind, Stage
from gateway.recipes.schema import Recipe
from smeltkit import limits
from smeltkit.errors import SmeltError, UnknownArtifact, UnknownModel, all_errors
from smeltkit.jobs.model import request_digest

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from gateway.cli.session import Session

_NOWHERE = "sha256:" + "0" * 64
"""Stands for what another stage has yet to make: whatever is wrong without it is found first."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a stage before it begins. What cannot be known yet is None."""

    stage: Stage
    inputs: Mapping[str, tuple[str | None, ...]]
    """Digests that go in, by key; None of what has yet to be made."""
    digest: str = ""
    """What it made, if that is stored; empty otherwise."""
    plan: job_pb2.Plan | None = None
    """None where it waits for others, or decides only."""
    refusals: tuple[SmeltError, ...] = ()

    @property
    def state(self) -> str:
        """stored, refused, ready or waits."""
        if self.digest:
            return "stored"
        if self.refusals:
            return "refused"
        return "ready" if all(all(digests) for digests in self.inputs.values()) else "waits"

    def document(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.stage.name,
            "verb": self.stage.kind.verb,
            "needs": list(self.stage.needs),
            "state": self.state,
            "inputs": {key: list(digests) for key, digests in self.inputs.items()},
            "digest": self.digest or None,
            "gives": self.stage.gives or None,
            "plan": plan_document(self.plan) if self.plan else None,
            "refusals": [{"reason": error.reason(), "message": error.message} for error in self.refusals],
        }


@dataclass
class Outlooks:
    """The outlook of every stage, in order."""

    recipe: Recipe
    stages: dict[str, Outlook] = field(default_factory=dict)

    @property
    def refusals(self) -> list[SmeltError]:
        """Why the recipe would not come to its end, as far as that is known; each names its stage."""
        return [_with_stage(error, outlook.stage) for outlook in self.stages.values() for error in outlook.refusals]


async def pinned(session: Session, recipe: Recipe) -> Recipe:
    """The recipe with every file that it names in the store, sent there where it was not."""
    for stage in recipe.stages.values():
        recipe = await stored(session, recipe, stage)
    return recipe


async def stored(session: Session, recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe with every file that one stage names in the store; errors name the stage."""
    if not stage.kind.missing(stage, recipe.files):
        return recipe
    with naming(stage), told(session, f"sends files of {stage.name} to the store"):
        return recipe.with_files(await stage.kind.store(session, stage))


@contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Errors of the block name the stage."""
    try:
        yield
    except SmeltError as error:
        raise _with_stage(error, stage) from error


@contextmanager
def told(session: Session, doing: str) -> Iterator[None]:
    """A note says what goes on if the block takes longer than COMMAND_SILENCE_S."""
    note = asyncio.get_running_loop().call_later(limits.COMMAND_SILENCE_S, session.output.note, doing)
    try:
        yield
    finally:
        note.cancel()


async def outlooks(session: Session, recipe: Recipe, *, also_past: bool = False) -> Outlooks:
    """The outlook of each stage of a pinned recipe. With `also_past` the outcome of an earlier job counts as stored
    where its service does not tell, as that of an evaluation whose engine is not loaded.
    """
    found = Outlooks(recipe)
    past = await _past(session) if also_past else {}
    for stage in recipe.stages.values():
        made = {name: each.digest for name, each in found.stages.items()}
        with naming(stage), told(session, asks(stage)):
            inputs = await inputs_of(session, stage, made)
            found.stages[stage.name] = await _outlook(session, recipe, stage, inputs, past)
    return found


async def inputs_of(session: Session, stage: Stage, made: Mapping[str, str]) -> dict[str, tuple[str | None, ...]]:
    """The digests that go into a stage: of what others `made`, by name, and of what the recipe refers to."""
    found: dict[str, tuple[str | None, ...]] = {}
    for edge in stage.edges:
        digest = made.get(edge.stage) or None if edge.stage else (await session.artifact(edge.reference)).digest
        found[edge.key] = (*found.get(edge.key, ()), digest)
    return found


def asks(stage: Stage) -> str:
    """Whom is asked for a stage, in words."""
    return f"asks {stage.kind.job.service if isinstance(stage.kind, JobKind) else 'the catalogue'} for {stage.name}"


def request_of(kind: JobKind, spec: Message) -> str:
    """The digest that all jobs of this request have."""
    return request_digest(kind.job.service, kind.job.kind, spec.SerializeToString(deterministic=True))


async def listed_jobs(session: Session, service: str = "") -> list[job_pb2.Job]:
    """Jobs, newest first."""
    request = job_pb2.ListJobsRequest(service=service, limit=limits.JOB_LIST_MAX)
    return list((await session.call(session.jobs.ListJobs, request)).jobs)


def _with_stage(error: SmeltError, stage: Stage) -> SmeltError:
    message = f"stage {stage.name}: {error.message}"
    return type(error)(message, details=error.details, retry_after_s=error.retry_after_s)


async def _past(session: Session) -> dict[str, str]:
    """The newest result of each request."""
    jobs = [job for job in await listed_jobs(session) if job.result_digest]
    return {job.request_digest: job.result_digest for job in reversed(jobs)}


async def _outlook(
    session: Session,
    recipe: Recipe,
    stage: Stage,
    inputs: Mapping[str, tuple[str | None, ...]],
    past: Mapping[str, str],
) -> Outlook:
    kind = stage.kind
    if not isinstance(kind, JobKind):
        return Outlook(stage=stage, inputs=inputs)
    whole: Inputs = {key: [digest or _NOWHERE for digest in digests] for key, digests in inputs.items()}
    spec = kind.spec(stage, whole, recipe.files)
    is_ready = all(all(digests) for digests in inputs.values())
    try:
        plan = await kind.job.plan(session, spec)
    except (UnknownArtifact, UnknownModel):
        if is_ready:
            raise
        return Outlook(stage=stage, inputs=inputs)
    except SmeltError as error:
        if error.retryable:
            raise
        return Outlook(stage=stage, inputs=inputs, refusals=(error,))
    refusals = tuple(all_errors()[one.reason](one.message) for one in plan.refusals)
    digest = plan.cached_digest or past.get(request_of(kind, spec), "")
    return Outlook(stage=stage, inputs=inputs, digest=digest, plan=plan, refusals=() if digest else refusals)
