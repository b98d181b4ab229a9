"""Many at once with bounded look-ahead: results in order of completion, everything cancelled when the caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")
TOGETHER_MAX: Final = 16
WAIT_S: Final = 0.025
"""How long a response waits for others to go with."""


async def judge_all(
    requests: AsyncIterator[Sequence[Request]], judge: Callable[[Request], Awaitable[Response]], *, parallel: int
) -> AsyncGenerator[list[Response], None]:
    """The responses to groups of requests as they come, in groups no larger than those and TOGETHER_MAX.

    At most `parallel` requests, and a group, are taken ahead. The first failure ends it.
    """
    loop, room, wake = asyncio.get_running_loop(), asyncio.Semaphore(parallel), asyncio.Event()
    ready: list[Response] = []
    together, under_way = 1, 0

    async def judge_one(request: Request) -> None:
        nonlocal under_way
        ready.append(await judge(request))
        under_way -= 1
        if len(ready) >= together or not under_way:
            wake.set()
        elif len(ready) == 1:
            loop.call_later(WAIT_S, wake.set)

    async def take_requests() -> None:
        nonlocal together, under_way
        async with asyncio.TaskGroup() as tasks:
            async for group in requests:
                while together < min(len(group), TOGETHER_MAX):
                    together += 1
                    room.release()
                for request in group:
                    await room.acquire()
                    under_way += 1
                    tasks.create_task(judge_one(request))

    taking = asyncio.ensure_future(take_requests())
    taking.add_done_callback(lambda _: wake.set())
    try:
        while ready or not taking.done():
            await wake.wait()
            wake.clear()
            while ready:
                group, ready[:together] = ready[:together], []
                for _ in group:
                    room.release()
                yield group
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
