"""Facts about models for the event stream: queued at once, published in the background, dropped rather than awaited."""

from __future__ import annotations

import asyncio
import logging

from google.protobuf.message import Message
from smelt.event.v1 import event_pb2

from services.inference.fallbacks import Fallback
from smeltkit import limits
from smeltkit.bus.client import Bus
from smeltkit.config import PlatformConfig
from smeltkit.errors import BusUnavailable
from smeltkit.telemetry import counter, names

log = logging.getLogger(__name__)


class ModelEvents:
    """Publishes ModelLoaded, ModelUnloaded and FallbackUsed; serving goes on while NATS is away."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[str, Message]] = asyncio.Queue(limits.EVENT_QUEUE_MAX)

    def loaded(self, digest: str, engine: str, load_s: float) -> None:
        """A model became ready after `load_s` seconds."""
        self._put("inference.model.loaded", event_pb2.ModelLoaded(digest=digest, engine=engine, load_s=load_s))

    def unloaded(self, digest: str, cause: str) -> None:
        """A model left: `idle`, `asked` or `failed`."""
        self._put("inference.model.unloaded", event_pb2.ModelUnloaded(digest=digest, cause=cause))

    def fell_back(self, fallback: Fallback) -> None:
        """Something slower or weaker than asked for is used."""
        counter(names.FALLBACKS).add(1, {names.SERVICE: "inference"})
        message = event_pb2.FallbackUsed(
            service="inference",
            requested=fallback.requested,
            effective=fallback.effective,
            cause=fallback.cause,
        )
        self._put("inference.fallback.used", message)

    async def publish(self, config: PlatformConfig, stop: asyncio.Event) -> None:
        """Publishes what is queued until `stop` is set; without an address of NATS facts are only logged."""
        stopping = asyncio.create_task(stop.wait())
        bus: Bus | None = None
        try:
            while not stop.is_set():
                item = asyncio.create_task(self._queue.get())
                await asyncio.wait((item, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    break
                log.info("event %s", item.result()[0])
                if not config.nats_url:
                    continue
                try:
                    bus = bus or await Bus.connect(config, name="inference")
                    await bus.publish_event(*item.result())
                except BusUnavailable as error:
                    log.warning("an event was not published: %s", error)
        finally:
            stopping.cancel()
            if bus is not None:
                await bus.close()

    def _put(self, subject: str, message: Message) -> None:
        try:
            self._queue.put_nowait((subject, message))
        except asyncio.QueueFull:
            log.warning("event %s dropped: %d wait already", subject, limits.EVENT_QUEUE_MAX)
