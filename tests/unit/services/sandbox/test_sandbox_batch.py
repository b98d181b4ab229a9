"""Many at once: order of completion, bounded look-ahead, clean ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.sandbox.batch import judge_all
from smeltkit.errors import BadCode

PARALLEL = 4


async def _numbers(count: int, taken: list[int], together: int = 1) -> AsyncIterator[list[int]]:
    for start in range(0, count, together):
        group = list(range(start, min(count, start + together)))
        taken += group
        yield group


async def test_answers_come_in_order_of_completion() -> None:
    gates = {number: asyncio.Event() for number in range(3)}

    async def judge(number: int) -> int:
        await gates[number].wait()
        return number

    answers = judge_all(_numbers(3, []), judge, parallel=PARALLEL)
    found = []
    for number in (2, 0, 1):
        gates[number].set()
        found += await anext(answers)
    assert found == [2, 0, 1]
    assert [rest async for rest in answers] == []


async def test_look_ahead_is_bounded() -> None:
    taken: list[int] = []
    waiting = asyncio.Event()

    async def judge(number: int) -> int:
        await waiting.wait()
        return number

    answers = judge_all(_numbers(100, taken), judge, parallel=PARALLEL)
    first = asyncio.ensure_future(anext(answers))
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(taken) == PARALLEL + 1
    waiting.set()
    assert len([await first, *[rest async for rest in answers]]) == 100


async def test_who_asks_together_is_answered_together() -> None:
    """No group is larger than those that came, none waits for a slow one, and each request has one answer."""
    slow = asyncio.Event()

    async def judge(number: int) -> int:
        await (slow.wait() if number == 7 else asyncio.sleep(0))
        return number

    answers = judge_all(_numbers(50, [], together=5), judge, parallel=PARALLEL)
    found = [await anext(answers)]
    while sum(map(len, found)) < 49:
        found.append(await anext(answers))
    slow.set()
    found += [rest async for rest in answers]
    assert max(map(len, found)) == 5 and len(found) < 50 and found[-1] == [7]
    assert sorted(number for group in found for number in group) == list(range(50))


async def test_first_failure_is_raised_as_itself() -> None:
    async def judge(number: int) -> int:
        raise BadCode("no")

    with pytest.raises(BadCode):
        [answer async for answer in judge_all(_numbers(3, []), judge, parallel=PARALLEL)]


async def test_caller_who_leaves_cancels_what_runs() -> None:
    cancelled = []

    async def judge(number: int) -> int:
        try:
            await asyncio.sleep(0 if number == 0 else 3600)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    answers = judge_all(_numbers(3, []), judge, parallel=PARALLEL)
    assert await anext(answers) == [0]
    await answers.aclose()
    assert sorted(cancelled) == [1, 2]
