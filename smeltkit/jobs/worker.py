"""Takes queued jobs of one service and runs them, for as long as the process lives.

A message only names a job; the record decides. The job is claimed under a fresh lease, the message is acknowledged,
and from then on the lease speaks for the job. Another job that was begun before goes first, see `turns`; the message
then goes back. Whatever goes wrong with NATS, the worker stays and tries again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping

from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.bus.client import Bus
from smeltkit.bus.consumer import Delivery, WorkQueue
from smeltkit.bus.leases import Lease, acquire
from smeltkit.errors import BusUnavailable, IllegalTransition, LeaseLost, NotBuilt, SmeltError, UnknownJob
from smeltkit.ids import new_id
from smeltkit.jobs import model
from smeltkit.jobs.attempt import Attempt, Handler, JobContext
from smeltkit.jobs.ledger import DELAY, JobLedger
from smeltkit.jobs.tasks import end_tasks, pause
from smeltkit.jobs.turns import Turns

__all__ = ["Handler", "JobContext", "Worker", "presence_key"]

_log = logging.getLogger(__name__)


def presence_key(service: str, worker: str = "") -> str:
    """The key in the leases bucket by which a worker shows that it lives; without `worker` their common beginning."""
    return f"worker.{service}.{worker}"


class Worker:
    """Runs the jobs of `service`, `slots` at a time; `handlers` maps kinds to what does them."""

    def __init__(
        self, bus: Bus, ledger: JobLedger, service: str, handlers: Mapping[str, Handler], *, slots: int = 1
    ) -> None:
        self._bus = bus
        self._ledger = ledger
        self._service = service
        self._handlers = dict(handlers)
        self._slots = slots
        self._name = new_id("worker")
        self._turns = Turns(ledger, service)

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set; jobs at hand then go back into the queue, unspent."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(stop))
            for _ in range(self._slots):
                group.create_task(self._serve(stop))

    async def _serve(self, stop: asyncio.Event) -> None:
        queue = self._bus.queue(self._service)
        while not stop.is_set():
            try:
                delivery = await self._next(queue, stop)
                if delivery is not None:
                    await self._take(delivery, stop)
            except SmeltError as error:
                _log.warning("%s worker: %s", self._service, error)
                await pause(stop, limits.JOB_FETCH_TIMEOUT_S)
        await self._close(queue)

    async def _next(self, queue: WorkQueue, stop: asyncio.Event) -> Delivery | None:
        """The next message; None if there is none yet, or `stop` is set."""
        pull, stopping = asyncio.create_task(queue.next()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({pull, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks({pull, stopping}, grace_s=limits.BUS_REQUEST_TIMEOUT_S)
        return None if pull.cancelled() else pull.result()

    async def _take(self, delivery: Delivery, stop: asyncio.Event) -> None:
        """Runs the job that the message names, if it is still to be done; the message is settled in any case."""
        delay_s = int(delivery.headers.get(DELAY, 0)) / 1000 if delivery.count == 1 else 0.0
        if delay_s > 0 or stop.is_set():
            await delivery.put_back(delay_s)
            return
        id = delivery.body.decode(errors="replace")
        try:
            record = await self._ledger.read(id)
        except BusUnavailable:
            raise
        except SmeltError as error:
            _log.error("a queued id leads nowhere: %s", error)
            await delivery.ack()
            return
        if record.job.state != model.QUEUED:
            await delivery.ack()
            return
        first = await self._turns.before(record)
        if first is not None:
            if first.wait_s > 0:
                await delivery.put_back(first.wait_s)
                return
            if await self._take_first(first.id, delivery, stop):
                return
        lease = await acquire(self._ledger.leases, id, self._ledger.bounds.lease_ttl_s)
        if lease is None:
            await delivery.put_back(self._ledger.bounds.heartbeat_s)
            return
        claimed = await self._claim(id, lease)
        await self._settle(delivery.ack())
        if claimed is not None:
            await self._work(claimed, lease, stop)

    async def _take_first(self, id: str, delivery: Delivery, stop: asyncio.Event) -> bool:
        """Runs another job than the message names, which goes back; whether it could be had."""
        lease = await acquire(self._ledger.leases, id, self._ledger.bounds.lease_ttl_s)
        claimed = None if lease is None else await self._claim(id, lease)
        if lease is None or claimed is None:
            return False
        await self._settle(delivery.put_back(self._ledger.bounds.heartbeat_s))
        await self._work(claimed, lease, stop)
        return True

    async def _work(self, claimed: job_pb2.JobRecord, lease: Lease, stop: asyncio.Event) -> None:
        handler = self._handlers.get(claimed.job.kind, self._refuse)
        await Attempt(self._ledger, claimed, lease).run(handler, stop)

    async def _claim(self, id: str, lease: Lease) -> job_pb2.JobRecord | None:
        try:
            return await self._ledger.change(
                id, lambda record: model.claim(record, fence=lease.fence, now_ns=time.time_ns())
            )
        except (IllegalTransition, LeaseLost, UnknownJob) as error:
            _log.info("job %s was not claimed: %s", id, error)
            await lease.release()
            return None

    async def _settle(self, settling: Awaitable[None]) -> None:
        try:
            await settling
        except BusUnavailable:
            _log.debug("a message will come again, and be dropped if its job was claimed")

    async def _refuse(self, context: JobContext) -> str:
        raise NotBuilt(f"{self._service} does no work of the kind {context.kind!r}; known: {sorted(self._handlers)}")

    async def _announce(self, stop: asyncio.Event) -> None:
        """Keeps this worker's name in the leases bucket, so that sweepers know that somebody serves the queue."""
        presence: Lease | None = None
        bounds = self._ledger.bounds
        while not stop.is_set():
            try:
                if presence is None:
                    key = presence_key(self._service, self._name)
                    presence = await acquire(self._ledger.leases, key, bounds.lease_ttl_s)
                else:
                    await presence.renew()
            except LeaseLost:
                presence = None
                continue
            except BusUnavailable as error:
                _log.debug("%s worker: %s", self._service, error)
            await pause(stop, bounds.heartbeat_s)
        if presence is not None and self._bus.is_connected:
            await presence.release()

    async def _close(self, queue: WorkQueue) -> None:
        try:
            await queue.close()
        except BusUnavailable as error:
            _log.debug("%s worker: %s", self._service, error)
