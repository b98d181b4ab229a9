"""The same request id gives the same verdict without a second run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from services.sandbox import repeats
from services.sandbox.repeats import Repeats
from services.sandbox.verdict import Record, Verdict
from smeltkit.errors import RequestIdReused


class Runs:
    """Counts runs; each waits for `go` and then gives the next verdict."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.started = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def run(self) -> Record:
        self.started += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Record(verdict=self.verdicts.pop(0))


def in_loop(test: Callable[[Repeats], Awaitable[None]]) -> None:
    async def main() -> None:
        await test(Repeats())

    asyncio.run(main())


def test_repeated_request_shares_one_run_also_while_it_is_under_way() -> None:
    async def test(repeated: Repeats) -> None:
        runs = Runs(Verdict.WRONG)
        both = asyncio.gather(*(repeated.once("a", b"x", runs.run) for _ in range(2)))
        await asyncio.sleep(0)
        runs.go.set()
        records = [*await both, await repeated.once("a", b"x", runs.run)]
        assert ({record.verdict for record in records}, runs.started) == ({Verdict.WRONG}, 1)

    in_loop(test)


def test_id_that_stood_for_another_candidate_is_refused() -> None:
    async def test(repeated: Repeats) -> None:
        runs = Runs(Verdict.PASSED)
        runs.go.set()
        await repeated.once("a", b"x", runs.run)
        with pytest.raises(RequestIdReused):
            await repeated.once("a", b"y", runs.run)

    in_loop(test)


def test_infrastructure_failure_and_requests_without_id_run_again() -> None:
    """R-088: a fault of ours is never remembered as somebody's verdict."""

    async def test(repeated: Repeats) -> None:
        runs = Runs(Verdict.INFRA, Verdict.PASSED, Verdict.PASSED)
        runs.go.set()
        assert (await repeated.once("a", b"x", runs.run)).verdict is Verdict.INFRA
        assert (await repeated.once("a", b"x", runs.run)).verdict is Verdict.PASSED
        await repeated.once("", b"x", runs.run)
        assert runs.started == 3

    in_loop(test)


def test_run_ends_only_when_the_last_caller_leaves() -> None:
    async def test(repeated: Repeats) -> None:
        runs = Runs(Verdict.PASSED)
        callers = [asyncio.ensure_future(repeated.once("a", b"x", runs.run)) for _ in range(2)]
        await asyncio.sleep(0)
        for caller in callers:
            assert runs.cancelled == 0
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            await asyncio.sleep(0)
        assert runs.cancelled == 1

    in_loop(test)


def test_oldest_verdict_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "KEPT_MAX", 2)

    async def test(repeated: Repeats) -> None:
        runs = Runs(*[Verdict.PASSED] * 4)
        runs.go.set()
        for id in "abc":
            await repeated.once(id, b"x", runs.run)
        await repeated.once("c", b"x", runs.run)
        assert runs.started == 3
        await repeated.once("a", b"x", runs.run)
        assert runs.started == 4

    in_loop(test)
