"""CloudEvents 1.0 in NATS headers, binary mode: the body stays protobuf, the attributes travel as `ce-*`.

`Nats-Msg-Id` equals the event's id, so that a repeated publish inside the stream's window is stored once; beyond the
window consumers know an event by its id. The trace context travels as `traceparent` and `tracestate`.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from smeltkit import telemetry
from smeltkit.errors import BadRequest
from smeltkit.ids import new_id

MESSAGE_ID: Final = "Nats-Msg-Id"
CONTENT_TYPE: Final = "application/protobuf"
TRACE_KEYS: Final = ("traceparent", "tracestate")

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What travels beside a body: who says what kind of thing, when, and under which trace."""

    id: str
    """Id of the fact; equal ids are the same fact."""
    kind: str
    """Full name of the protobuf message, version included, e.g. smelt.event.v1.BundleStored."""
    source: str
    """Who says it, e.g. smelt/importer."""
    time: str
    """When it was said, RFC 3339 UTC."""
    trace: Mapping[str, str]
    """Trace context: `traceparent`, `tracestate`; empty if there was none."""

    def to_headers(self) -> dict[str, str]:
        """The envelope as NATS headers."""
        return {
            MESSAGE_ID: self.id,
            "ce-specversion": "1.0",
            "ce-id": self.id,
            "ce-type": self.kind,
            "ce-source": self.source,
            "ce-time": self.time,
            "ce-datacontenttype": CONTENT_TYPE,
            "ce-dataschema": f"smelt:{self.kind}",
            **self.trace,
        }

    @classmethod
    def from_headers(cls, headers: Mapping[str, str] | None) -> Envelope:
        """The envelope of a received message; BadRequest names what is missing or not ours."""
        found = headers or {}
        if found.get("ce-specversion") != "1.0":
            raise BadRequest(f"ce-specversion {found.get('ce-specversion')!r} is not 1.0: no CloudEvent in binary mode")
        for key in ("ce-id", "ce-type", "ce-source", "ce-time"):
            if not found.get(key):
                raise BadRequest(f"header {key} is missing")
        trace = {key: found[key] for key in TRACE_KEYS if key in found}
        id, kind, source, time = (found[f"ce-{name}"] for name in ("id", "type", "source", "time"))
        return cls(id=id, kind=kind, source=source, time=time, trace=trace)

    def decode(self, message_class: type[M], body: bytes) -> M:
        """`body` as `message_class`; BadRequest if the envelope declares another type or the bytes do not parse."""
        expected = message_class.DESCRIPTOR.full_name
        if self.kind != expected:
            raise BadRequest(f"event {self.id} is a {self.kind}, not a {expected}")
        try:
            return message_class.FromString(body)
        except DecodeError as error:
            raise BadRequest(f"event {self.id} does not parse as {expected}") from error


def seal(message: Message, *, source: str, id: str) -> Envelope:
    """The envelope of `message`, said now, under the present trace."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    trace = {key: value for key, value in telemetry.inject().items() if key in TRACE_KEYS}
    return Envelope(id=id, kind=message.DESCRIPTOR.full_name, source=f"smelt/{source}", time=now, trace=trace)


def fact_id(subject: str, message: Message) -> str:
    """The id under which `message` is published on `subject`.

    A message that names its job is a fact of that job: the id is derived from the content, so that a repeated attempt
    says nothing twice. Any other message is a fact of this moment and gets a fresh id.
    """
    if not getattr(message, "job_id", ""):
        return new_id("event")
    return hashlib.sha256(subject.encode() + b"\0" + message.SerializeToString(deterministic=True)).hexdigest()
