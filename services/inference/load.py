"""What this replica has to do, for routers and for scalers: requests that wait or run, and their tokens.

A request counts from its arrival, so also while its model is fetched and loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from smeltkit import limits
from smeltkit.telemetry import Metric, gauge, names

_ENGINE = {names.ENGINE: "llama"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The load at one moment."""

    waiting: int
    running: int
    tokens: int
    models: frozenset[str]


class Load:
    """The books of one replica. Used on one event loop."""

    def __init__(self, ready: Callable[[], frozenset[str]]) -> None:
        """`ready` gives the digests of the models that are ready."""
        self._ready = ready
        self._levels = {names.QUEUE_DEPTH: 0, names.RUNNING: 0, names.TOKENS_IN_FLIGHT: 0}
        self._closed = asyncio.Event()

    @contextmanager
    def request(self, tokens: int) -> Iterator[Callable[[], None]]:
        """Counts a request of so many tokens while the block lasts: as waiting, then, once called, as running."""
        level = names.QUEUE_DEPTH

        def run() -> None:
            nonlocal level
            if level is not names.RUNNING:
                self._add(level, -1)
                level = names.RUNNING
                self._add(level, 1)

        self._add(level, 1)
        self._add(names.TOKENS_IN_FLIGHT, tokens)
        try:
            yield run
        finally:
            self._add(level, -1)
            self._add(names.TOKENS_IN_FLIGHT, -tokens)

    async def reports(self) -> AsyncIterator[Report]:
        """The load now, then each change of it, at most every LOAD_REPORT_PERIOD_S, until `close`."""
        last: Report | None = None
        while not self._closed.is_set():
            if (report := self._report()) != last:
                yield report
                last = report
            try:
                await asyncio.wait_for(self._closed.wait(), limits.LOAD_REPORT_PERIOD_S)
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Ends all streams of reports: the replica drains."""
        self._closed.set()

    def _report(self) -> Report:
        waiting, running, tokens = self._levels.values()
        return Report(waiting=waiting, running=running, tokens=tokens, models=self._ready())

    def _add(self, level: Metric, amount: int) -> None:
        self._levels[level] += amount
        gauge(level).add(amount, _ENGINE)
