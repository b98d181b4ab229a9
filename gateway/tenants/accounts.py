"""What tenants used in the window of time that runs, and refusing what goes beyond.

An account is one entry of a bucket, changed only by compare-and-swap: several gateways share it, and it outlives them.
A charge has a key (the digest of a file, the id of a job) and counts once a window, however often it is made: a call
that is repeated costs nothing, and what was charged in the window before is not charged again but for its growth.

Tokens have no key: each gateway gathers them for TENANT_FLUSH_S before it writes, and loses so much when it is killed.
Of charges in one window the newest TENANT_CHARGES_MAX are known by their keys, of older ones only the sum.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Final

from gateway.tenants.keys import BYTES, GPU, TOKENS, Quota, Tenant
from smeltkit import limits
from smeltkit.bus.kv import Bucket
from smeltkit.errors import BusUnavailable, QuotaUsedUp, RevisionConflict
from smeltkit.jobs.tasks import pause

_log = logging.getLogger(__name__)
_UNITS: Final = {TOKENS: "tokens", BYTES: "bytes stored", GPU: "GPU seconds"}


@dataclass(frozen=True, kw_only=True)
class Window:
    """What was used of one resource since `begins_s`."""

    begins_s: int = 0
    """Unix time."""
    used: float = 0.0
    charges: Mapping[str, float]
    """Amounts of this window by their keys, oldest first."""
    before: Mapping[str, float]
    """Amounts charged by the end of the window before, by the keys that were charged in it."""

    def at(self, begins_s: int) -> Window:
        """This window, or the empty one that begins then."""
        if begins_s == self.begins_s:
            return self
        before = {key: self.before.get(key, 0.0) + amount for key, amount in self.charges.items()}
        return Window(begins_s=begins_s, charges={}, before=before)

    def has(self, key: str, amount: float) -> bool:
        """Whether the key was charged in this window, for as much at least."""
        name = _short(key)
        return name in self.charges and self.charges[name] + self.before.get(name, 0.0) >= amount

    def charged(self, amounts: Mapping[str, float]) -> Window:
        """With these amounts in place of what their keys were charged before."""
        charges, used = dict(self.charges), self.used
        for name, amount in amounts.items():
            key = _short(name)
            due = max(amount - self.before.get(key, 0.0), 0.0)
            used += due - charges.pop(key, 0.0)
            charges[key] = due
        kept = dict(list(charges.items())[-limits.TENANT_CHARGES_MAX :])
        return replace(self, used=round(max(used, 0.0), 3), charges=kept)


_EMPTY: Final = Window(charges={}, before={})


class Accounts:
    """The accounts of all tenants. Used on one event loop; every call raises BusUnavailable while NATS is away."""

    def __init__(self, bucket: Bucket, clock: Callable[[], float] = time.time) -> None:
        self._bucket, self._clock = bucket, clock
        self._pending: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def used(self, tenant: Tenant) -> dict[str, float]:
        """What the tenant used in the present windows, by resource that is bounded."""
        windows, _ = await self._read(tenant.name)
        pending = self._pending[tenant.name]
        return {
            resource: windows.get(resource, _EMPTY).at(self.begins_s(quota)).used + pending[resource]
            for resource, quota in tenant.quotas.items()
        }

    async def check(self, tenant: Tenant, resource: str, amount: float = 0.0) -> None:
        """QuotaUsedUp, with the time until the next window, if `amount` more is not free, or nothing is."""
        if (quota := tenant.quotas.get(resource)) is not None:
            self._refuse(tenant, resource, quota, (await self.used(tenant))[resource], amount)

    async def reserve(self, tenant: Tenant, resource: str, amounts: Mapping[str, float]) -> None:
        """Charges under each key its amount unless that was done in this window: all, or none and QuotaUsedUp."""
        if (quota := tenant.quotas.get(resource)) is None:
            return

        def step(window: Window) -> Window:
            due = {key: amount for key, amount in amounts.items() if not window.has(key, amount)}
            if not due:
                return window
            charged = window.charged(due)
            self._refuse(tenant, resource, quota, window.used, charged.used - window.used, len(due))
            return charged

        await self._change(tenant.name, resource, quota, step)

    async def settle(self, tenant: Tenant, resource: str, amounts: Mapping[str, float]) -> None:
        """Charges what was really used, in place of what the keys were charged before; refuses nothing."""
        if amounts and (quota := tenant.quotas.get(resource)) is not None:
            await self._change(tenant.name, resource, quota, lambda window: window.charged(amounts))

    def count(self, tenant: Tenant, resource: str, amount: float) -> None:
        """Adds an amount without a key; it is written soon, by `run`."""
        if resource in tenant.quotas and amount:
            self._pending[tenant.name][resource] += amount

    async def run(self, tenant_of: Callable[[str], Tenant | None], stop: asyncio.Event) -> None:
        """Writes what was counted, every TENANT_FLUSH_S and when `stop` is set; outages of NATS are waited out."""
        while not stop.is_set():
            await pause(stop, limits.TENANT_FLUSH_S)
            try:
                await self.flush(tenant_of)
            except (BusUnavailable, RevisionConflict) as error:
                _log.warning("what tenants used is written later: %s", error)

    async def flush(self, tenant_of: Callable[[str], Tenant | None]) -> None:
        """Writes what was counted; what is of a tenant that is no more is forgotten."""
        for name in list(self._pending):
            for resource, amount in list(self._pending[name].items()):
                tenant = tenant_of(name)
                quota = tenant.quotas.get(resource) if tenant else None
                if quota is not None:
                    await self._change(name, resource, quota, partial(_added, amount))
                self._pending[name][resource] -= amount

    def begins_s(self, quota: Quota) -> int:
        """Unix time at which the present window began."""
        return int(self._clock() // quota.window_s) * quota.window_s

    def _refuse(self, tenant: Tenant, resource: str, quota: Quota, used: float, more: float, count: int = 1) -> None:
        """`count`: how many files or jobs are to have the `more`."""
        if used < quota.allowed and used + more <= quota.allowed:
            return
        left_s = self.begins_s(quota) + quota.window_s - self._clock()
        what = "this needs" if count == 1 else f"these {count} files need"
        needs = f", and {what} {more:,.0f} more, of which nothing was charged" if more else ""
        raise QuotaUsedUp(
            f"{tenant.name} used {used:,.0f} of {quota.allowed:,} {_UNITS[resource]} in {quota.window_s} s{needs}; the"
            f" next window begins in {left_s:.0f} s. Wait for it, or have {resource}= raised in the file of API keys",
            details={
                "tenant": tenant.name, "resource": resource, "used": f"{used:.0f}", "allowed": str(quota.allowed),
                "renews_in_s": f"{left_s:.0f}",
            },
            retry_after_s=left_s,
        )  # fmt: skip

    async def _change(self, name: str, resource: str, quota: Quota, step: Callable[[Window], Window]) -> None:
        """Applies `step` by compare-and-swap, reading again when another gateway was faster."""
        async with self._locks[name]:
            for _ in range(limits.CAS_TRIES_MAX):
                windows, revision = await self._read(name)
                window = windows.get(resource, _EMPTY).at(self.begins_s(quota))
                if (changed := step(window)) == window:
                    return
                value = json.dumps({key: asdict(one) for key, one in {**windows, resource: changed}.items()}).encode()
                try:
                    if revision:
                        await self._bucket.update(_key(name), value, revision)
                    else:
                        await self._bucket.create(_key(name), value)
                    return
                except RevisionConflict:
                    continue
        raise RevisionConflict(f"the account of {name} changed {limits.CAS_TRIES_MAX} times meanwhile; try again")

    async def _read(self, name: str) -> tuple[dict[str, Window], int]:
        entry = await self._bucket.get(_key(name))
        if entry is None:
            return {}, 0
        return {resource: Window(**row) for resource, row in json.loads(entry.value).items()}, entry.revision


def _added(amount: float, window: Window) -> Window:
    return replace(window, used=round(window.used + amount, 3))


def _short(key: str) -> str:
    """Enough of a digest or an id to tell it from others."""
    return key.removeprefix("sha256:")[:24]


def _key(name: str) -> str:
    """The name of a tenant as a key: one token of a subject, whatever a file of keys may call a tenant."""
    return name.replace("=", "=3d").replace(".", "=2e")
