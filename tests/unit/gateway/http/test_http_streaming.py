"""Long answers end when the client leaves, and give a sign of life in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from gateway.http.streaming import until_gone, with_pauses


async def _never() -> dict[str, str]:
    return await asyncio.Event().wait()  # type: ignore[return-value]


async def _gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


async def test_work_that_ends_is_done() -> None:
    assert await until_gone(_never, asyncio.sleep(0))


async def test_client_that_leaves_cancels_the_work_and_its_clean_up_runs() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    assert not await until_gone(_gone, work())
    assert cleaned == [True]


async def test_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await until_gone(_never, work())


async def test_cancelling_the_wait_cancels_the_work() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    waiting = asyncio.ensure_future(until_gone(_never, work()))
    await started.wait()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert ended.is_set()


async def test_silence_gives_none_and_loses_no_item() -> None:
    release = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        yield 1
        await release.wait()
        yield 2

    seen: list[int | None] = []
    async for item in with_pauses(source(), 0.01):
        seen.append(item)
        if seen.count(None) == 3:
            release.set()
    assert [item for item in seen if item is not None] == [1, 2]
    assert seen[1:4] == [None] * 3


async def test_error_of_the_source_passes_through() -> None:
    async def source() -> AsyncIterator[int]:
        yield 1
        raise ValueError("theirs")

    with pytest.raises(ValueError, match="theirs"):
        [item async for item in with_pauses(source(), 1)]


async def test_closing_cancels_what_the_source_waits_for() -> None:
    ended = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            await asyncio.Event().wait()
            yield 1
        finally:
            ended.set()

    async with aclosing(with_pauses(source(), 0.01)) as items:
        assert await anext(items) is None
    assert ended.is_set()
