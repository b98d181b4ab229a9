"""Many at once: order of completion, bounded look-ahead, clean ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.sandbox.batch import judge_all
from smeltkit.errors import BadCode

PARALLEL = 4


async def _numbers(count: int, taken: list[int]) -> AsyncIterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


async def test_answers_come_in_order_of_completion() -> None:
    gates = {number: asyncio.Event() for number in range(3)}

    async def judge(number: int) -> int:
        await gates[number].wait()
        return number

    answers = judge_all(_numbers(3, []), judge, parallel=PARALLEL)
    found = []
    for number in (2, 0, 1):
        gates[number].set()
        found.append(await anext(answers))
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
    assert await anext(answers) == 0
    await answers.aclose()
    assert sorted(cancelled) == [1, 2]
