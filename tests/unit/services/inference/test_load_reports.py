"""What a replica tells of its load, to routers and to scalers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.inference.load import Load, Report
from smeltkit import limits


def report(waiting: int, running: int, tokens: int, *models: str) -> Report:
    return Report(waiting=waiting, running=running, tokens=tokens, models=frozenset(models))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOAD_REPORT_PERIOD_S", 0.01)


async def test_requests_wait_then_run_then_are_gone() -> None:
    models = {"one"}
    load = Load(lambda: frozenset(models))
    reports = load.reports()
    assert await anext(reports) == report(0, 0, 0, "one")
    with load.request(100) as runs:
        assert await anext(reports) == report(1, 0, 100, "one")
        with load.request(20):
            runs()
            runs()
            assert await anext(reports) == report(1, 1, 120, "one")
        models.add("two")
        assert await anext(reports) == report(0, 1, 100, "one", "two")
    assert await anext(reports) == report(0, 0, 0, "one", "two")


async def test_a_request_that_fails_is_gone_too() -> None:
    load = Load(frozenset)
    with pytest.raises(ZeroDivisionError), load.request(7):
        raise ZeroDivisionError
    assert await anext(load.reports()) == report(0, 0, 0)


async def test_reports_end_when_the_replica_drains() -> None:
    load = Load(frozenset)
    seen = asyncio.create_task(_all(load.reports()))
    await asyncio.sleep(0)
    await load.close()
    assert await asyncio.wait_for(seen, 10) == [report(0, 0, 0)]


async def _all(reports: AsyncIterator[Report]) -> list[Report]:
    return [report async for report in reports]
