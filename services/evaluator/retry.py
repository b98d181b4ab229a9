"""Patience with components that are away: repeat with growing pauses up to a bound, then say so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from smeltkit import limits
from smeltkit.errors import ServiceUnavailable, SmeltError, Timeout

T = TypeVar("T")
_log = logging.getLogger(__name__)


async def patiently(
    what: str, action: Callable[[], Awaitable[T]], *, outage_max_s: float = limits.EVALUATION_OUTAGE_MAX_S
) -> T:
    """The outcome of `action`, repeated while it fails for reasons that may pass.

    After `outage_max_s` without success: ServiceUnavailable, which lets the job be tried again later. Any other error
    is raised at once. The bound counts from the first failure in a row: long work is no outage.
    """
    failing_since, tries = 0.0, 0
    while True:
        try:
            return await action()
        except (SmeltError, ConnectionError) as error:
            if isinstance(error, SmeltError) and not (error.retryable or isinstance(error, Timeout)):
                raise
            now = time.monotonic()
            failing_since = failing_since or now
            if now - failing_since >= outage_max_s:
                raise ServiceUnavailable(
                    f"{what}: no success for {outage_max_s:g} s, last: {error}; see that the service runs"
                ) from error
            asked_s = getattr(error, "retry_after_s", None) or 0.0
            pause_s = limits.EVALUATION_BACKOFF_S[min(tries, len(limits.EVALUATION_BACKOFF_S) - 1)]
            _log.info("%s: %s; again in %.1f s", what, error, max(pause_s, asked_s))
            tries += 1
        await asyncio.sleep(min(max(pause_s, asked_s), outage_max_s))
