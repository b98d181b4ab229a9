"""A NATS server, a ledger and workers with short bounds: everything that jobs need, for tests about jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2

from smeltkit.bus import Bus, topology
from smeltkit.bus.deadletter import read_dead
from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.sweeper import run_sweeper
from smeltkit.jobs.worker import Handler, Worker
from smeltkit.testing.nats import NatsServer, nats_server

SERVICE: Final = "toy"
_LOOKS_MAX, _LOOK_PERIOD_S = 1_000, 0.02

BOUNDS: Final = JobBounds(
    lease_ttl_s=2.0,
    heartbeat_s=0.3,
    sweep_period_s=0.2,
    attempts_max=3,
    backoff_s=(0.1,),
    no_worker_s=60,
    cancel_grace_s=3,
    progress_period_s=0.05,
    watch_heartbeat_s=0.5,
)
"""Bounds under which a lost worker is noticed in seconds."""


@dataclass(frozen=True, kw_only=True)
class JobRig:
    """A running server, and one process's connection and ledger on it."""

    server: NatsServer
    bus: Bus
    ledger: JobLedger

    async def start(self, kind: str, request_id: str = "", body: str = "") -> job_pb2.Job:
        """A started job of the toy service; a fresh request id unless one is given."""
        request = job_pb2.GetJobRequest(id=body)
        return await self.ledger.start(
            service=SERVICE, kind=kind, request=request, request_id=request_id or uuid4().hex
        )

    async def end(self, id: str, timeout_s: float = 60) -> job_pb2.Job:
        """The job once it is over; TimeoutError if it is not within `timeout_s`."""
        return await self.until(id, *model.FINAL, timeout_s=timeout_s)

    async def until(self, id: str, *states: job_pb2.JobState.ValueType, timeout_s: float = 60) -> job_pb2.Job:
        """The job once it is in one of `states`."""
        async with asyncio.timeout(timeout_s), aclosing(self.ledger.watch(id)) as jobs:
            async for job in jobs:
                if job.state in states:
                    return job
        raise AssertionError(f"{id} ended in another state than {states}")

    async def dead_letters(self, count: int) -> list[event_pb2.JobDead]:
        """The dead letters once there are `count`; a letter follows its job's end."""
        for _ in range(_LOOKS_MAX):
            if len(letters := await read_dead(self.bus)) >= count:
                return letters
            await asyncio.sleep(_LOOK_PERIOD_S)
        raise AssertionError(f"fewer than {count} dead letters")

    async def lease_is_free(self, id: str) -> None:
        """Returns once nobody holds the job's lease; it is released after the job's end is stored."""
        for _ in range(_LOOKS_MAX):
            if await self.ledger.leases.get(id) is None:
                return
            await asyncio.sleep(_LOOK_PERIOD_S)
        raise AssertionError(f"the lease of {id} is still held")

    @asynccontextmanager
    async def working(
        self, handlers: Mapping[str, Handler], *, slots: int = 1, sweepers: int = 1
    ) -> AsyncIterator[asyncio.Event]:
        """A worker and sweepers of the toy service while the block runs; the event stops them earlier."""
        stop = asyncio.Event()
        worker = Worker(self.bus, self.ledger, SERVICE, handlers, slots=slots)
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.run(stop))
            for _ in range(sweepers):
                group.create_task(run_sweeper(self.ledger, stop))
            try:
                yield stop
            finally:
                stop.set()


@asynccontextmanager
async def connected(server: NatsServer, bounds: JobBounds = BOUNDS) -> AsyncIterator[JobRig]:
    """A connection of its own to the server, as another process would have."""
    bus = await Bus.connect(server.config, name="test")
    try:
        yield JobRig(server=server, bus=bus, ledger=JobLedger(bus, bounds))
    finally:
        await bus.close()


@asynccontextmanager
async def job_rig(bounds: JobBounds = BOUNDS) -> AsyncIterator[JobRig]:
    """A server of its own with the platform's topology for the toy service, and a connection to it."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(connected(stack.enter_context(nats_server()), bounds))
        await topology.apply(rig.bus, topology.declare(services=[SERVICE], lease_ttl_s=bounds.lease_ttl_s))
        yield rig
