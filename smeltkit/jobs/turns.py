"""Whose turn it is: a job that was begun goes before those that were not, as soon as it may go on.

A queue hands out ids in the order in which they came, and a job that lost its worker or is tried again comes last; yet
it holds what it did, a place on a disk and somebody's patience. So before a worker begins anything new it looks at the
records, of which it reads what changed since. Jobs that others seem to work on when it looks first are waited for until
their leases are renewed or they are queued again: a worker that was killed and started anew finds its own among them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from smelt.job.v1 import job_pb2

from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.ledger import JobLedger


@dataclass(frozen=True, kw_only=True)
class Before:
    """What goes before a job that was never begun."""

    id: str = ""
    """A job that was; empty where it is not known yet."""
    wait_s: float = 0.0
    """Seconds until it may go on, or until it is known."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A record of a job that was begun and is queued again, and when it was first seen so."""

    record: job_pb2.JobRecord
    since_s: float

    def left_s(self, now_s: float, bounds: JobBounds) -> float:
        """Seconds of the wait between two attempts that are left."""
        attempt = self.record.job.attempt
        return max(self.since_s + bounds.backoff_after(attempt) - now_s, 0.0) if attempt else 0.0


class Turns:
    """The jobs of one service as a worker looks at them."""

    def __init__(self, ledger: JobLedger, service: str) -> None:
        self._ledger, self._service = ledger, service
        self._revision = 0
        self._again: dict[str, Seen] = {}
        self._doubtful: dict[str, int | None] | None = None
        self._until_s = 0.0

    async def before(self, record: job_pb2.JobRecord) -> Before | None:
        """What goes before a queued job; None if it is that job's turn. A job that may go on is named once, to whoever
        asks first. BusUnavailable."""
        running = await self._refresh()
        if self._doubtful is None:
            bounds = self._ledger.bounds
            self._until_s = time.monotonic() + bounds.lease_ttl_s + 2 * bounds.sweep_period_s
            self._doubtful = {id: await self._lease_of(id) for id in running}
        if model.was_begun(record):
            return None
        now_s, bounds = time.monotonic(), self._ledger.bounds
        waiting = [(seen.left_s(now_s, bounds), seen.since_s, id) for id, seen in self._again.items()]
        if waiting:
            left_s, _, first = min(waiting)
            if not left_s:
                del self._again[first]
            return Before(id=first, wait_s=left_s)
        if await self._is_any_doubtful():
            return Before(wait_s=bounds.heartbeat_s)
        return None

    async def _refresh(self) -> set[str]:
        """Takes in what changed; ids of the jobs that run, of those that did."""
        records, self._revision = await self._ledger.records(self._revision)
        running = set()
        for record in records:
            job = record.job
            if job.service != self._service:
                continue
            self._again.pop(job.id, None)
            if job.state == model.QUEUED and model.was_begun(record):
                self._again[job.id] = Seen(record=record, since_s=time.monotonic())
            if job.state == model.RUNNING:
                running.add(job.id)
            elif self._doubtful:
                self._doubtful.pop(job.id, None)
        return running

    async def _is_any_doubtful(self) -> bool:
        """Whether a job that ran when this worker looked first may have nobody who works on it."""
        assert self._doubtful is not None
        if time.monotonic() >= self._until_s:
            self._doubtful.clear()
        for id, revision in list(self._doubtful.items()):
            lease = await self._lease_of(id)
            if lease is not None and lease != revision:
                del self._doubtful[id]
        return bool(self._doubtful)

    async def _lease_of(self, id: str) -> int | None:
        """Revision of the lease of a job; None if it has none."""
        entry = await self._ledger.leases.get(id)
        return None if entry is None else entry.revision
