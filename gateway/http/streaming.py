"""Two things every long answer needs: to end when the client leaves, and to make a sign of life when nothing comes.

Starlette notices a lost client only at the next write on servers that speak a newer ASGI, which may be a long prefill
away; so `until_gone` watches the connection itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work` until it ends, or cancels it at once when the client leaves; whether it ended.

    The request's body must have been read. What `work` raises is raised.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        is_done = task.done()
        if is_done:
            task.result()
        return is_done
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def with_pauses(source: AsyncIterator[T], period_s: float) -> AsyncGenerator[T | None]:
    """The items of `source`, and None each time that `period_s` passed without one."""
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({pending}, timeout=period_s)
            if not done:
                yield None
                continue
            finished, pending = pending, None
            try:
                item = finished.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
