"""What jobs cost: seconds of a machine and of GPUs, tokens and bytes as their results tell them, and their price."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from smelt.artifact.v1 import artifact_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.jobs_view import state_of
from gateway.cli.prices import PriceConfig
from smeltkit import limits
from smeltkit.errors import NotFound

if TYPE_CHECKING:
    from gateway.cli.session import Session

HOUR_S: Final = 3600.0
_AMOUNTS: Final = ("time_s", "gpu_s", "tokens", "size_bytes")


@dataclass(frozen=True, kw_only=True)
class JobCost:
    """One job, or several together under the name of what they have in common. None is what was not measured."""

    name: str
    """Id of the job, its tenant, or its service and kind."""
    kind: str
    """Service and kind; empty for several kinds."""
    tenant: str
    """Tenant; empty for several."""
    state: str
    """State of the job; empty for several."""
    jobs: int = 1
    time_s: float | None = None
    """Seconds: of the work where its result tells them, else from the start of the job to its end."""
    gpu_s: float | None = None
    """Seconds of GPUs, each counted."""
    tokens: int | None = None
    """Tokens trained on or generated."""
    size_bytes: int | None = None
    """Bytes of the result."""

    def price(self, prices: PriceConfig) -> float | None:
        """What was measured, at these prices; None without any."""
        if not prices.is_set:
            return None
        return (
            (self.time_s or 0) / HOUR_S * prices.machine_hour
            + (self.gpu_s or 0) / HOUR_S * prices.gpu_hour
            + (self.tokens or 0) / 1e6 * prices.million_tokens
            + (self.size_bytes or 0) / limits.GIB * prices.gib
        )

    def document(self, prices: PriceConfig) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "price": self.price(prices)}


def cost_of(job: job_pb2.Job, result: artifact_pb2.Artifact | None, runs: Sequence[Mapping[str, Any]] = ()) -> JobCost:
    """The cost of a job that is over, by its result, if that is still stored, and the runs that a training recorded."""
    span_ns = job.update_time.ToNanoseconds() - job.create_time.ToNanoseconds()
    known = JobCost(
        name=job.id,
        kind=f"{job.service} {job.kind}",
        tenant=job.tenant,
        state=state_of(job),
        time_s=0.0 if job.is_cached else span_ns / 1e9,
        gpu_s=job.gpu_s or (None if job.service == "trainer" else 0.0),
        size_bytes=None if result is None else result.size_bytes,
    )
    if job.is_cached or result is None:
        return known
    if runs:
        time_s = max(run["cost"]["time_s"] for run in runs)
        gpus = 0 if runs[0]["device"].startswith("cpu") else runs[0]["settings"].get("processes", 1)
        tokens = sum(run["cost"]["tokens"] for run in runs)
        return replace(known, time_s=time_s, gpu_s=job.gpu_s or gpus * time_s, tokens=tokens)
    told = json.loads(result.config_json)
    if "completion_tokens" in told:
        return replace(known, time_s=told["times"]["total_s"], tokens=told["completion_tokens"])
    return known


def together(costs: Iterable[JobCost], key: str) -> list[JobCost]:
    """Sums over the costs that have the same `key` (`kind` or `tenant`), the longest first."""
    found: dict[str, JobCost] = {}
    for cost in costs:
        name = getattr(cost, key)
        common = {"name": name, "kind": "", "tenant": "", "state": "", key: name}
        found[name] = _sum(found[name], cost) if name in found else replace(cost, **common)
    return sorted(found.values(), key=lambda cost: -(cost.time_s or 0))


def total(costs: Sequence[JobCost]) -> JobCost:
    """All of them."""
    found = JobCost(name="total", kind="", tenant="", state="", jobs=0)
    for cost in costs:
        found = _sum(found, cost)
    return found


async def gathered(session: Session, jobs: Iterable[job_pb2.Job]) -> list[JobCost]:
    """The costs of the jobs that are over."""
    request = trainer_pb2.ListRunsRequest(limit=limits.RUNS_LISTED_MAX)
    over = [
        job for job in jobs if job.HasField("update_time") and state_of(job) in ("succeeded", "failed", "cancelled")
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    if any(job.service == "trainer" for job in over):
        for run in (await session.call(session.trainer.ListRuns, request)).runs:
            config = json.loads(run.config_json)
            runs.setdefault(config["job"], []).append(config)
    return [cost_of(job, await _result(session, job), runs.get(job.id, ())) for job in over]


async def _result(session: Session, job: job_pb2.Job) -> artifact_pb2.Artifact | None:
    """What the job made; None if it made nothing, or that is gone."""
    if not job.result_digest:
        return None
    try:
        return await session.artifact(job.result_digest)
    except NotFound:
        return None


def _sum(one: JobCost, other: JobCost) -> JobCost:
    """Both; an amount that only one has is that one's."""
    sums: dict[str, Any] = {}
    for name in _AMOUNTS:
        known = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        sums[name] = sum(known) if known else None
    return replace(one, jobs=one.jobs + other.jobs, **sums)
