"""Key-value buckets with compare-and-swap: the port `Bucket`, and the real one on JetStream.

A revision is the position of the write in the bucket's stream: unique, and growing over all keys. The fake in
`smeltkit.testing` passes the same contract test.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import api

from smeltkit import limits
from smeltkit.bus import publisher
from smeltkit.bus.envelope import MESSAGE_ID
from smeltkit.bus.subjects import doorbell_subject
from smeltkit.errors import BadRequest, RevisionConflict

if TYPE_CHECKING:
    from smeltkit.bus.client import Bus

_OPERATION = "KV-Operation"
_NO_STREAM = 10059


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The present value of a key."""

    key: str
    value: bytes
    revision: int


class Doorbell:
    """Rings when a key may have changed; the reader then looks. Rings between two waits are not lost."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wakes the waiter, now or at its next wait."""
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it rang within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Bucket(Protocol):
    """A key-value bucket. Every call raises BusUnavailable while NATS is away."""

    async def get(self, key: str) -> Entry | None:
        """The entry of `key`, or None."""

    async def create(self, key: str, value: bytes) -> int:
        """Stores a key that does not exist; its revision. RevisionConflict if it exists."""

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the value written at `revision`; the new revision. RevisionConflict if it is another by now."""

    async def delete(self, key: str, revision: int) -> None:
        """Removes the value written at `revision`. RevisionConflict if it is another by now."""

    async def entries(self, after_revision: int = 0) -> list[Entry]:
        """All present entries written after `after_revision`, oldest write first."""

    def watch(self, key: str) -> AbstractAsyncContextManager[Doorbell]:
        """A doorbell for `key`. It may ring too often, and after an outage not at all: look now and then as well."""


class NatsBucket:
    """A bucket of JetStream (KV layout: stream `KV_<name>`, subjects `$KV.<name>.<key>`)."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self._name = name
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."

    async def get(self, key: str) -> Entry | None:
        """The entry of `key`, or None; read from the leader, so a write is seen by every later read."""
        last = await self._last(key)
        if last is None or _is_marker(last.headers):
            return None
        return Entry(key=key, value=last.data or b"", revision=last.seq or 0)

    async def create(self, key: str, value: bytes) -> int:
        """Stores a key that does not exist, or was deleted; RevisionConflict if it exists."""
        last = await self._last(key)
        return await self._write(key, value, last.seq or 0 if last is not None and _is_marker(last.headers) else 0)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the value written at `revision`."""
        return await self._write(key, value, revision)

    async def delete(self, key: str, revision: int) -> None:
        """Removes the value written at `revision`; a marker without value stays until the bucket forgets it."""
        await self._write(key, b"", revision, headers={_OPERATION: "DEL"})

    async def entries(self, after_revision: int = 0) -> list[Entry]:
        """All present entries written after `after_revision`, by a throw-away consumer.

        The consumer may live on a server that is behind the leader: it is read until the leader's last write has come.
        """
        return await self._bus.call(f"listing {self._name}", lambda: self._scan(after_revision))

    @asynccontextmanager
    async def watch(self, key: str) -> AsyncIterator[Doorbell]:
        """A doorbell for `key`, rung by the bucket's republished writes (after they are stored)."""
        bell = Doorbell()

        async def on_message(_: Msg) -> None:
            bell.ring()

        async with self._bus.listen(doorbell_subject(self._name, key), on_message):
            yield bell

    async def _last(self, key: str) -> api.RawStreamMsg | None:
        return await self._bus.call(f"reading {self._name}", lambda: self._ask_leader(key))

    async def _ask_leader(self, keys: str) -> api.RawStreamMsg | None:
        """The last write of `keys` (a key, or `>` for all) as the stream's leader has it."""
        try:
            return await self._bus.jetstream.get_msg(self._stream, subject=self._prefix + keys)
        except nats.js.errors.NotFoundError as error:
            if error.err_code == _NO_STREAM:
                raise nats.js.errors.NoStreamResponseError from error
            return None

    async def _write(self, key: str, value: bytes, last: int, headers: dict[str, str] | None = None) -> int:
        if len(value) > limits.KV_VALUE_MAX_BYTES:
            raise BadRequest(f"{self._name}: value of {len(value)} bytes exceeds {limits.KV_VALUE_MAX_BYTES}")
        message_id = uuid.uuid4().hex
        try:
            return await publisher.publish(
                self._bus, self._prefix + key, value, message_id=message_id, headers=headers, expected_revision=last
            )
        except RevisionConflict:
            # NATS compares revisions before it looks for duplicates: a repeated write conflicts with its own first try.
            found = await self._last(key)
            if found is None or (found.headers or {}).get(MESSAGE_ID) != message_id:
                raise
            return found.seq or 0

    async def _scan(self, after_revision: int) -> list[Entry]:
        newest = await self._ask_leader(">")
        if newest is None or (newest.seq or 0) <= after_revision:
            return []
        jetstream, name = self._bus.jetstream, f"scan-{uuid.uuid4().hex[:12]}"
        config = api.ConsumerConfig(
            name=name,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE if after_revision else api.DeliverPolicy.ALL,
            opt_start_seq=after_revision + 1 if after_revision else None,
            ack_policy=api.AckPolicy.NONE,
            inactive_threshold=limits.BUS_REQUEST_TIMEOUT_S,
            mem_storage=True,
            num_replicas=1,
        )
        info = await jetstream.add_consumer(self._stream, config)
        subscription = await jetstream.pull_subscribe_bind(consumer=name, stream=self._stream)
        found: dict[str, Entry] = {}
        try:
            pending, reached = info.num_pending or 0, 0
            while reached < (newest.seq or 0):
                size = min(max(pending, 1), limits.BUS_SCAN_BATCH)
                batch = await subscription.fetch(size, limits.BUS_ATTEMPT_TIMEOUT_S)
                for message in batch:
                    self._collect(message, found)
                pending, reached = batch[-1].metadata.num_pending, batch[-1].metadata.sequence.stream
        finally:
            await subscription.unsubscribe()
            await jetstream.delete_consumer(self._stream, name)
        return sorted(found.values(), key=lambda entry: entry.revision)

    def _collect(self, message: Msg, found: dict[str, Entry]) -> None:
        key = message.subject.removeprefix(self._prefix)
        found.pop(key, None)
        if not _is_marker(message.headers):
            found[key] = Entry(key=key, value=message.data, revision=message.metadata.sequence.stream)


def _is_marker(headers: Mapping[str, str] | None) -> bool:
    """Whether a stored message says that its key was deleted."""
    return bool(headers) and _OPERATION in (headers or {})
