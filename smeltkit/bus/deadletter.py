"""Dead letters: work that used up its attempts, kept on SMELT_DLQ with its reason until somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import nats.js.errors
from nats.js import api
from smelt.event.v1 import event_pb2

from smeltkit import limits
from smeltkit.bus.envelope import Envelope, seal
from smeltkit.bus.subjects import DEAD_STREAM, DEFAULT_TENANT, dead_subject

if TYPE_CHECKING:
    from smeltkit.bus.client import Bus


class Publisher(Protocol):
    """What sends messages: the bus, or its fake."""

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        """Stores a message once a message id; its sequence."""


async def publish_dead(bus: Publisher, dead: event_pb2.JobDead, *, kind: str, tenant: str = DEFAULT_TENANT) -> None:
    """Stores the dead letter of a job, once: its message id is the job's."""
    envelope = seal(dead, source=dead.service, id=f"dead.{dead.job_id}")
    await bus.publish(
        dead_subject(dead.service, kind, tenant),
        dead.SerializeToString(deterministic=True),
        message_id=envelope.id,
        headers=envelope.to_headers(),
    )


async def read_dead(bus: Bus, *, limit: int = limits.JOB_LIST_MAX) -> list[event_pb2.JobDead]:
    """The newest `limit` dead letters, newest first. Reading removes nothing."""

    async def newest() -> int:
        return int((await bus.jetstream.stream_info(DEAD_STREAM)).state.last_seq)

    async def at(sequence: int) -> api.RawStreamMsg | None:
        try:
            return await bus.jetstream.get_msg(DEAD_STREAM, seq=sequence)
        except nats.js.errors.NotFoundError:
            return None

    found: list[event_pb2.JobDead] = []
    for sequence in range(await bus.call("reading dead letters", newest), 0, -1):
        if len(found) >= limit:
            break
        message = await bus.call("reading dead letters", partial(at, sequence))
        if message is None:
            continue
        found.append(Envelope.from_headers(message.headers).decode(event_pb2.JobDead, message.data or b""))
    return found
