"""Verdicts by request id: the same id with the same candidate gives the same verdict, not a second run."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from services.sandbox.verdict import Record, Verdict
from smeltkit.errors import RequestIdReused

KEPT_MAX: Final = 1024
"""Verdicts that are remembered; beyond it the oldest is forgotten."""
ID_MAX_CHARS: Final = 128


@dataclasses.dataclass(kw_only=True)
class _Request:
    content: bytes
    run: asyncio.Task[Record]
    callers: int = 0


class Repeats:
    """Runs that are under way or remembered. An infrastructure failure, a refusal and a run that every caller left are
    forgotten, so that they can be tried again."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, _Request] = OrderedDict()

    async def once(self, request_id: str, content: bytes, run: Callable[[], Awaitable[Record]]) -> Record:
        """The record of `run`, shared by all that ask with this id; RequestIdReused if it stood for other `content`."""
        if not request_id:
            return await run()
        request = self._requests.get(request_id)
        if request is None:
            request = _Request(content=content, run=asyncio.ensure_future(_as_coroutine(run)))
            self._requests[request_id] = request
        elif request.content != content:
            raise RequestIdReused(f"request id {request_id!r} stood for another candidate; choose a new one")
        request.callers += 1
        try:
            return await asyncio.shield(request.run)
        finally:
            request.callers -= 1
            self._tidy(request_id, request)

    def _tidy(self, request_id: str, request: _Request) -> None:
        if request.callers == 0 and not _is_kept(request.run):
            request.run.cancel()
            if self._requests.get(request_id) is request:
                del self._requests[request_id]
        if len(self._requests) > KEPT_MAX:
            oldest = next((id for id, known in self._requests.items() if known.run.done()), None)
            if oldest is not None:
                del self._requests[oldest]


def _is_kept(run: asyncio.Task[Record]) -> bool:
    is_done = run.done() and not run.cancelled() and run.exception() is None
    return is_done and run.result().verdict is not Verdict.INFRA


async def _as_coroutine(run: Callable[[], Awaitable[Record]]) -> Record:
    return await run()
