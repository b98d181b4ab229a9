"""Tokens that tenants used in the window that runs, and refusing what goes beyond.

Fixed windows, counted by one process: of several gateways each counts its own. A completion is counted when it ends, so
those under way when the bound is met still end, and the last ones may go beyond it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from gateway.http.keys import Tenant
from smeltkit.errors import QuotaUsedUp


class Quotas:
    """What each tenant used. Used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._windows: dict[str, int] = {}
        self._used: Counter[str] = Counter()

    def check(self, tenant: Tenant) -> None:
        """QuotaUsedUp, with the time until the next window, if the tenant's tokens are used up."""
        if not tenant.tokens_max:
            return
        self._turn(tenant)
        if self._used[tenant.name] >= tenant.tokens_max:
            left_s = tenant.window_s - self._clock() % tenant.window_s
            raise QuotaUsedUp(
                f"{tenant.name} used {self._used[tenant.name]} tokens of {tenant.tokens_max} in {tenant.window_s} s; "
                f"the next window begins in {left_s:.0f} s",
                retry_after_s=left_s,
            )

    def count(self, tenant: Tenant, tokens: int) -> None:
        """Adds what a completion read and generated, whether it ended well or was cut."""
        if tenant.tokens_max:
            self._turn(tenant)
            self._used[tenant.name] += tokens

    def _turn(self, tenant: Tenant) -> None:
        window = int(self._clock() // tenant.window_s)
        if self._windows.get(tenant.name) != window:
            self._windows[tenant.name], self._used[tenant.name] = window, 0
