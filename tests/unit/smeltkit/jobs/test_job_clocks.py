"""Clocks of two machines differ: nothing about a job waits for one of them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from smelt.job.v1 import job_pb2

from smeltkit.jobs import ledger as ledger_module
from smeltkit.jobs.ledger import DELAY, JobLedger
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.jobs.worker import Worker
from smeltkit.testing.bus import MemoryBus
from smeltkit.testing.jobs import BOUNDS

HOUR_NS = 3600 * 10**9
QUICK = replace(BOUNDS, sweep_period_s=0.01)


@pytest.mark.parametrize("step_ns", [HOUR_NS, -HOUR_NS])
async def test_a_lost_message_is_replaced_whatever_the_clock_said_that_queued_the_job(
    step_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-120: the sweeper counts from when it saw the record, not from the time that stands in it."""
    bus = MemoryBus()
    ledger = JobLedger(bus, QUICK)
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() + step_ns, monotonic=time.monotonic)
    monkeypatch.setattr(ledger_module, "time", clock)
    await ledger.start(service="toy", kind="count", request=job_pb2.GetJobRequest(), request_id="one")
    bus.queued.clear()
    sweeper = Sweeper(ledger)
    await sweeper.sweep()
    assert not bus.queued, "it has just been seen"
    await asyncio.sleep(2 * QUICK.sweep_period_s)
    await sweeper.sweep()
    assert len(bus.queued) == 1


@pytest.mark.parametrize(("count", "delays"), [(1, [5.0]), (2, [])])
async def test_a_delay_is_a_duration_that_the_first_worker_asks_the_queue_for(count: int, delays: list[float]) -> None:
    """Handed out again after it, the message is taken, by whatever clock."""
    bus, put_back, acknowledged = MemoryBus(), [], []

    async def keep(delay_s: float) -> None:
        put_back.append(delay_s)

    async def ack() -> None:
        acknowledged.append(True)

    delivery = SimpleNamespace(headers={DELAY: "5000"}, count=count, body=b"job-gone", put_back=keep, ack=ack)
    worker = Worker(bus, JobLedger(bus, BOUNDS), "toy", {})  # type: ignore[arg-type]
    await worker._take(delivery, asyncio.Event())  # type: ignore[arg-type]
    assert put_back == delays and len(acknowledged) == 1 - len(delays)
