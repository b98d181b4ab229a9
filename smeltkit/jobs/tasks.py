"""Ending asyncio tasks for certain, and waiting that a shutdown cuts short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any


async def end_tasks(
    tasks: Iterable[asyncio.Future[Any]], *, grace_s: float, repeat_s: float = 0.1
) -> set[asyncio.Future[Any]]:
    """Cancels `tasks` until they have ended or `grace_s` are over; those that still run.

    One cancel is not enough: `asyncio.wait_for` of Python 3.11, which the NATS client uses, drops a cancel that arrives
    together with its result. It is repeated every `repeat_s`, which must leave time for clean-up.
    """
    deadline = time.monotonic() + grace_s
    pending = {task for task in tasks if not task.done()}
    while pending and (left_s := deadline - time.monotonic()) > 0:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=min(repeat_s, left_s))
    return pending


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Waits for `seconds`, but not longer than until `stop` is set."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
