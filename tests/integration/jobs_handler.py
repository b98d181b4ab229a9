"""What tests of the worker share: a handler whose ends the test decides, and what goes on behind a worker's back."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from smeltkit.bus.subjects import job_subject
from smeltkit.errors import RevisionConflict
from smeltkit.ids import digest_bytes
from smeltkit.jobs.attempt import JobContext
from smeltkit.testing.jobs import SERVICE, JobRig

DIGEST = digest_bytes(b"result")


class Toy:
    """A handler that counts its runs and lets the test decide how each ends."""

    def __init__(self, *ends: Exception | None) -> None:
        self.runs: list[JobContext] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        self._ends = list(ends)

    async def __call__(self, context: JobContext) -> str:
        self.runs.append(context)
        end = self._ends.pop(0) if self._ends else None
        if end is not None:
            raise end
        return DIGEST

    async def slow(self, context: JobContext) -> str:
        """Waits for the gate."""
        self.runs.append(context)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return DIGEST


async def queue_again(rig: JobRig, id: str) -> None:
    """The job's message once more, as a redelivery would bring it."""
    await rig.bus.publish(job_subject(SERVICE, "count"), id.encode(), message_id=uuid4().hex)


async def queue_is_drained(rig: JobRig) -> None:
    """Returns when no message is left, so that whatever a message could do it has done."""
    for _ in range(1_000):
        if await rig.ledger.is_queue_empty(SERVICE):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("messages are left")


async def take_lease_away(rig: JobRig, id: str) -> None:
    """Deletes the lease of a job under its holder, as its expiry would."""
    for _ in range(100):
        lease = await rig.ledger.leases.get(id)
        assert lease is not None
        try:
            return await rig.ledger.leases.delete(id, lease.revision)
        except RevisionConflict:
            continue  # it was renewed in between
