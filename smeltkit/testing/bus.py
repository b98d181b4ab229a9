"""NATS in memory, for tests that turn every stone of an order of events: buckets and a work queue without a clock.

It passes the same contract test as the real one (tests/integration/test_bucket_contract.py). Every call lets other
tasks run first, as a network would. Keys expire when a test says so; a message stays queued until it is taken out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from smeltkit.bus.kv import Doorbell, Entry
from smeltkit.errors import RevisionConflict


@dataclass(frozen=True, kw_only=True, eq=False)
class Published:
    """One stored message; equal only to itself."""

    subject: str
    body: bytes
    message_id: str
    headers: Mapping[str, str]


class MemoryBucket:
    """A bucket in memory; revisions grow over all keys, as in the real one."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._last = 0
        self._bells: dict[str, set[Doorbell]] = {}

    async def get(self, key: str) -> Entry | None:
        """The entry of `key`, or None."""
        await asyncio.sleep(0)
        return self._entries.get(key)

    async def create(self, key: str, value: bytes) -> int:
        """Stores a key that does not exist; RevisionConflict if it exists."""
        await asyncio.sleep(0)
        if key in self._entries:
            raise RevisionConflict(f"{key} exists")
        return self._put(key, value)

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Replaces the value written at `revision`; RevisionConflict if it is another by now."""
        await asyncio.sleep(0)
        self._check(key, revision)
        return self._put(key, value)

    async def delete(self, key: str, revision: int) -> None:
        """Removes the value written at `revision`; RevisionConflict if it is another by now."""
        await asyncio.sleep(0)
        self._check(key, revision)
        self.expire(key)
        self._last += 1

    async def entries(self, after_revision: int = 0) -> list[Entry]:
        """All present entries written after `after_revision`, oldest write first."""
        await asyncio.sleep(0)
        found = [entry for entry in self._entries.values() if entry.revision > after_revision]
        return sorted(found, key=lambda entry: entry.revision)

    @asynccontextmanager
    async def watch(self, key: str) -> AsyncIterator[Doorbell]:
        """A doorbell for `key`."""
        bell = Doorbell()
        self._bells.setdefault(key, set()).add(bell)
        try:
            yield bell
        finally:
            self._bells[key].discard(bell)

    def expire(self, key: str) -> None:
        """Forgets `key`, as if its time had passed; nothing happens if it does not exist."""
        self._entries.pop(key, None)

    def _check(self, key: str, revision: int) -> None:
        entry = self._entries.get(key)
        if entry is None or entry.revision != revision:
            raise RevisionConflict(f"{key} is not at revision {revision}")

    def _put(self, key: str, value: bytes) -> int:
        self._last += 1
        self._entries[key] = Entry(key=key, value=value, revision=self._last)
        for bell in self._bells.get(key, ()):
            bell.ring()
        return self._last


class MemoryBus:
    """Buckets by name, and everything published, once a message id."""

    def __init__(self) -> None:
        self._buckets: dict[str, MemoryBucket] = {}
        self._ids: dict[str, int] = {}
        self.published: list[Published] = []
        """Every message ever stored, oldest first."""
        self.queued: list[Published] = []
        """Messages of the work queue that nobody has acknowledged; tests take them out."""

    def bucket(self, name: str) -> MemoryBucket:
        """The bucket of that name; the same one every time."""
        return self._buckets.setdefault(name, MemoryBucket())

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        """Stores a message once a message id; its sequence."""
        if message_id in self._ids:
            return self._ids[message_id]
        message = Published(subject=subject, body=body, message_id=message_id, headers=dict(headers or {}))
        self.published.append(message)
        if subject.startswith("smelt.job."):
            self.queued.append(message)
        return self._ids.setdefault(message_id, len(self.published))

    async def is_queue_empty(self, service: str) -> bool:
        """Whether no message of the service is queued."""
        return not any(message.subject.startswith(f"smelt.job.{service}.") for message in self.queued)
