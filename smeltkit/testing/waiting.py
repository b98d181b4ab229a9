"""Waiting in tests for what another task or process will bring about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(condition: Callable[[], T], *, timeout_s: float = 10.0) -> T:
    """The first true value of `condition`, asked every 10 ms; AssertionError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"still not true after {timeout_s} s")
