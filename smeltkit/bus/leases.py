"""Leases: the right to work, for as long as it is renewed. A bucket whose keys expire holds them.

The revision at which a lease was created is its **fencing token**: later holders have greater ones. A lease alone is
no mutual exclusion (its holder may sleep through the expiry), so every effect is written with the token and refused
when a greater one is known.
"""

from __future__ import annotations

import time

from smeltkit.bus.kv import Bucket
from smeltkit.errors import LeaseLost, RevisionConflict
from smeltkit.ids import new_id


class Lease:
    """A lease held by this process. Made by `acquire`."""

    def __init__(self, bucket: Bucket, key: str, holder: bytes, revision: int, ttl_s: float, started: float) -> None:
        self._bucket = bucket
        self._key = key
        self._holder = holder
        self._revision = revision
        self._ttl_s = ttl_s
        self._renewed = started
        self.fence = revision

    @property
    def remaining_s(self) -> float:
        """Seconds until it expires unless it is renewed; at 0 and below somebody else may hold it."""
        return self._renewed + self._ttl_s - time.monotonic()

    async def renew(self) -> None:
        """Prolongs the lease by its full life; LeaseLost if it expired, BusUnavailable if NATS is away."""
        started = time.monotonic()
        try:
            self._revision = await self._bucket.update(self._key, self._holder, self._revision)
        except RevisionConflict as error:
            # A renewal whose answer was lost moved the revision without our knowledge: the holder's name tells.
            entry = await self._bucket.get(self._key)
            if entry is None or entry.value != self._holder:
                raise LeaseLost(f"the lease of {self._key} expired and is not ours any more") from error
            self._revision = entry.revision
        self._renewed = started

    async def release(self) -> None:
        """Gives the lease back before it expires; nothing happens if it is not ours any more."""
        try:
            await self._bucket.delete(self._key, self._revision)
        except RevisionConflict:
            return


async def acquire(bucket: Bucket, key: str, ttl_s: float) -> Lease | None:
    """A fresh lease of `key`, or None while somebody holds it. `ttl_s` is the life the bucket gives its keys."""
    holder, started = new_id("holder").encode(), time.monotonic()
    try:
        revision = await bucket.create(key, holder)
    except RevisionConflict:
        return None
    return Lease(bucket, key, holder, revision, ttl_s, started)
