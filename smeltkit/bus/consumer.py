"""The work queue of a service: pulled one message at a time, acknowledged by hand.

A message carries a job id and nothing else: the job's record says what is to be done. Acknowledge once the record says
that the work is taken; put back only with a delay, because a plain negative acknowledgement comes back at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from smeltkit import limits
from smeltkit.bus.subjects import JOBS_STREAM, worker_durable

if TYPE_CHECKING:
    from smeltkit.bus.client import Bus


class Delivery:
    """One message handed to this worker. Not settled within JOB_ACK_WAIT_S, it is handed out again."""

    def __init__(self, bus: Bus, message: Msg) -> None:
        self._bus = bus
        self._message = message
        self.body = message.data
        self.subject = message.subject
        self.headers: Mapping[str, str] = message.headers or {}
        self.count: int = message.metadata.num_delivered or 1
        """How often the message was handed out, this time included."""

    async def ack(self) -> None:
        """Removes the message; returns when NATS has confirmed it."""

        async def once() -> None:
            await self._message.ack_sync(timeout=limits.BUS_ATTEMPT_TIMEOUT_S)

        await self._bus.call("acknowledging", once)

    async def put_back(self, delay_s: float) -> None:
        """Leaves the message in the queue; it is handed out again after `delay_s`."""
        await self._bus.call("putting back", lambda: self._message.nak(delay=max(delay_s, limits.BUS_RETRY_PAUSE_S)))


class WorkQueue:
    """Pulls from the durable of one service; workers of all replicas share it."""

    def __init__(self, bus: Bus, service: str) -> None:
        self._bus = bus
        self._durable = worker_durable(service)
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def next(self, timeout_s: float = limits.JOB_FETCH_TIMEOUT_S) -> Delivery | None:
        """The next message, or None if none came within `timeout_s`; BusUnavailable while NATS is away."""
        if self._subscription is None:
            self._subscription = await self._bus.call("opening the queue", self._open)
        subscription = self._subscription

        async def once() -> Msg | None:
            try:
                return (await subscription.fetch(1, timeout_s))[0]
            except nats.errors.TimeoutError:
                return None

        message = await self._bus.call("pulling work", once)
        return None if message is None else Delivery(self._bus, message)

    async def close(self) -> None:
        """Stops pulling; a message on its way comes back after JOB_ACK_WAIT_S."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and self._bus.is_connected:
            await self._bus.call("closing the queue", subscription.unsubscribe)

    async def _open(self) -> JetStreamContext.PullSubscription:
        return await self._bus.jetstream.pull_subscribe_bind(consumer=self._durable, stream=JOBS_STREAM)


async def is_queue_empty(bus: Bus, service: str) -> bool:
    """Whether no message waits in the service's queue and none is in a worker's hands; False without a durable."""

    async def once() -> bool:
        try:
            info = await bus.jetstream.consumer_info(JOBS_STREAM, worker_durable(service))
        except nats.js.errors.NotFoundError:
            return False
        return not info.num_pending and not info.num_ack_pending

    return await bus.call("looking at the queue", once)
