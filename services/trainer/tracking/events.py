"""Steps of a training as facts on NATS, the newest one of each interval, and its stages and alerts.

What cannot be published stops no run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from smelt.event.v1 import event_pb2

from smeltkit import limits
from smeltkit.bus.client import Bus
from smeltkit.errors import BusUnavailable

_log = logging.getLogger(__name__)
Fact = event_pb2.TrainingStep | event_pb2.TrainingStage | event_pb2.TrainingAlert
_TOLD = ("step", "steps", "loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "memory_bytes", "mfu")


class StepEvents:
    """Publishes the steps, stages and alerts of one job. Made on the event loop, told from a thread."""

    def __init__(self, bus: Bus, job_id: str) -> None:
        self._bus, self._job_id = bus, job_id
        self._loop = asyncio.get_running_loop()
        self._published_s = 0.0

    def tell(self, step: Mapping[str, Any]) -> None:
        """Publishes a step's report, unless the last one was a moment ago and this is not the end."""
        now_s = time.monotonic()
        if now_s - self._published_s < limits.TRAIN_EVENT_PERIOD_S and step["step"] < step["steps"]:
            return
        self._published_s = now_s
        found = {key: step[key] for key in _TOLD}
        self._send(
            "trainer.step.measured", event_pb2.TrainingStep(job_id=self._job_id, name=step.get("name", ""), **found)
        )

    def alert(self, alert: Mapping[str, Any], name: str = "") -> None:
        """Publishes an alert, of the adapter `name` where several are trained together."""
        self._send("trainer.alert.fired", to_alert(alert, self._job_id, name))

    def enter(self, stage: Mapping[str, Any], name: str = "") -> None:
        """Publishes that a stage followed upon another, and leaves a line in the log."""
        _log.info("job %s: %s%s", self._job_id, f"{name}: " if name else "", stage["message"])
        self._send("trainer.stage.entered", event_pb2.TrainingStage(job_id=self._job_id, name=name, **stage))

    def _send(self, fact: str, message: Fact) -> None:
        asyncio.run_coroutine_threadsafe(self._publish(fact, message), self._loop)

    async def _publish(self, fact: str, message: Fact) -> None:
        try:
            await self._bus.publish_event(fact, message)
        except BusUnavailable:
            _log.debug("job %s: %s of step %d was not published", self._job_id, fact, message.step)


def to_alert(alert: Mapping[str, Any], job_id: str, name: str = "") -> event_pb2.TrainingAlert:
    """An alert as a message."""
    return event_pb2.TrainingAlert(job_id=job_id, name=name, **alert)
