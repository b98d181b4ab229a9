"""Many at once with bounded look-ahead: results in order of completion, everything cancelled when the caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


async def judge_all(
    requests: AsyncIterator[Request], judge: Callable[[Request], Awaitable[Response]], *, parallel: int
) -> AsyncGenerator[Response, None]:
    """The responses to `requests` as they come; at most `parallel` are taken ahead. The first failure ends it."""
    room, responses = asyncio.Semaphore(parallel), asyncio.Queue[Response | None]()

    async def judge_one(request: Request) -> None:
        responses.put_nowait(await judge(request))

    async def take_requests() -> None:
        async with asyncio.TaskGroup() as group:
            async for request in requests:
                await room.acquire()
                group.create_task(judge_one(request))

    taking = asyncio.ensure_future(take_requests())
    taking.add_done_callback(lambda _: responses.put_nowait(None))
    try:
        while (response := await responses.get()) is not None:
            room.release()
            yield response
        await _without_group(taking)
    finally:
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)


async def _without_group(task: asyncio.Future[None]) -> None:
    """Waits for `task`; the first error of its group is raised as itself."""
    try:
        await task
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
