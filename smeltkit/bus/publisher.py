"""Publishing that survives a restart of NATS: every message has an id, so a retry is stored at most once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from google.protobuf.message import Message
from nats.js.errors import APIError
from opentelemetry.trace import SpanKind

from smeltkit import limits, telemetry
from smeltkit.bus.envelope import MESSAGE_ID, fact_id, seal
from smeltkit.bus.facts import check_fact
from smeltkit.bus.subjects import DEFAULT_TENANT, event_subject
from smeltkit.errors import BadRequest, DiskFull, RevisionConflict
from smeltkit.telemetry import names

if TYPE_CHECKING:
    from smeltkit.bus.client import Bus

_EXPECTED_REVISION = "Nats-Expected-Last-Subject-Sequence"
_WRONG_REVISION = (10071, 10164)
_STORE_FAILED = 10077


async def publish(
    bus: Bus,
    subject: str,
    body: bytes,
    *,
    message_id: str,
    headers: Mapping[str, str] | None = None,
    expected_revision: int | None = None,
) -> int:
    """Stores `body` once, however often the sending must be repeated; the stream sequence is returned.

    With `expected_revision` the last message of the subject must have that sequence (0: none), else RevisionConflict.
    BusUnavailable after BUS_REQUEST_TIMEOUT_S without an answer; then it may or may not be stored. DiskFull if the
    stream or its disk is full.
    """
    sent = {**(headers or {}), MESSAGE_ID: message_id}
    if expected_revision is not None:
        sent[_EXPECTED_REVISION] = str(expected_revision)

    async def once() -> int:
        try:
            ack = await bus.jetstream.publish(subject, body, timeout=limits.BUS_ATTEMPT_TIMEOUT_S, headers=dict(sent))
        except APIError as error:
            if error.err_code in _WRONG_REVISION:
                raise RevisionConflict(f"{subject} is not at revision {expected_revision}; read it again") from error
            if error.err_code == _STORE_FAILED:
                remedy = "free disk space of NATS, or remove old entries"
                raise DiskFull(f"NATS cannot store {subject}: {error.description}; {remedy}") from error
            raise
        return int(ack.seq)

    return await bus.call(f"publishing on {subject}", once)


async def publish_event(bus: Bus, fact: str, message: Message, *, tenant: str = DEFAULT_TENANT) -> None:
    """Publishes one fact, e.g. `importer.bundle.stored`, on SMELT_EVENTS.

    A message that names its job (field job_id) is stored once, also when a later attempt repeats it. BadRequest for
    an undeclared fact, another message than the fact's, or one that is too large.
    """
    subject, body = event_subject(check_fact(fact, message), tenant), message.SerializeToString(deterministic=True)
    if len(body) > limits.EVENT_MAX_BYTES:
        raise BadRequest(f"event {fact} has {len(body)} bytes, at most {limits.EVENT_MAX_BYTES}; send a digest")
    about = {names.MESSAGING_SYSTEM: "nats", names.MESSAGING_DESTINATION: subject, names.MESSAGING_OPERATION: "publish"}
    with telemetry.span(f"publish {fact}", SpanKind.PRODUCER, **about):
        envelope = seal(message, source=fact.split(".", 1)[0], id=fact_id(subject, message))
        await publish(bus, subject, body, message_id=envelope.id, headers=envelope.to_headers())
