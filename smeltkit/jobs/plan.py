"""What a job would do, found out without doing it: the same for every service, as a value and as a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from smelt.job.v1 import job_pb2

from smeltkit.errors import SmeltError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes read and stored, peak memory, seconds, steps, facts, numbers, refusals, and the stored result if there is
    one.

    Bytes and seconds are 0 where there is nothing to base a forecast on.
    """

    read_bytes: int = 0
    write_bytes: int = 0
    memory_bytes: int = 0
    time_s: float = 0.0
    steps: tuple[str, ...] = ()
    items: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    refusals: tuple[SmeltError, ...] = ()
    cached_digest: str = ""

    def check(self) -> None:
        """Raises the first refusal, if there is any."""
        for refusal in self.refusals:
            raise refusal


def to_plan(plan: Plan) -> job_pb2.Plan:
    """A plan as a message."""
    return job_pb2.Plan(
        read_bytes=plan.read_bytes,
        write_bytes=plan.write_bytes,
        memory_bytes=plan.memory_bytes,
        time_s=plan.time_s,
        steps=plan.steps,
        items=[job_pb2.PlanItem(name=name, value=value) for name, value in plan.items.items()],
        counts=plan.counts,
        refusals=[job_pb2.Refusal(reason=error.reason(), message=error.message) for error in plan.refusals],
        cached_digest=plan.cached_digest,
    )
