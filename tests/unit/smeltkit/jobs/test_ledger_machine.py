"""The ledger under any order of events: workers that die, sleep and wake, messages again and again, two sweepers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from smelt.job.v1 import job_pb2

from smeltkit.bus.leases import Lease, acquire
from smeltkit.errors import IllegalTransition, LeaseLost, RequestIdReused, RevisionConflict
from smeltkit.jobs import model
from smeltkit.jobs.bounds import JobBounds
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.sweeper import Sweeper
from smeltkit.testing.bus import MemoryBus, Published

BOUNDS = JobBounds(attempts_max=3, no_worker_s=1e9, sweep_period_s=0.0)
NAMES = st.sampled_from(["a", "b"])


class Holder:
    """A worker in the middle of an attempt; it does not know whether its lease still lives."""

    def __init__(self, id: str, lease: Lease) -> None:
        self.id = id
        self.lease = lease
        self.digest = f"sha256:{lease.fence:064x}"


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens: one end a job, by the newest holder, and every job comes to an end once the chaos stops."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.bus = MemoryBus()
        self.ledger = JobLedger(self.bus, BOUNDS)
        self.sweepers = [Sweeper(self.ledger), Sweeper(self.ledger)]
        self.seen: list[Published] = []
        self.holders: list[Holder] = []
        self.ends: dict[str, bytes] = {}
        self.fences: dict[str, int] = {}
        self.cancelled: set[str] = set()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @rule(name=NAMES, body=st.sampled_from(["x", "x", "y"]))
    def start(self, name: str, body: str) -> None:
        request = job_pb2.GetJobRequest(id=body)
        try:
            job = self._run(self.ledger.start(service="toy", kind="k", request=request, request_id=name))
        except RequestIdReused:
            return
        record = self._run(self.ledger.read(job.id))
        assert record.request == request.SerializeToString(deterministic=True)

    @rule(index=st.integers(0, 5))
    def deliver(self, index: int) -> None:
        """A worker gets a message: a new one, or one that was handed out before."""
        self.seen = list(dict.fromkeys([*self.seen, *self.bus.queued]))
        if self.seen:
            self._run(self._take(self.seen[index % len(self.seen)]))

    @rule(index=st.integers(0, 5))
    def lose_a_message(self, index: int) -> None:
        if self.bus.queued:
            self.bus.queued.pop(index % len(self.bus.queued))

    @rule(index=st.integers(0, 5))
    def expire(self, index: int) -> None:
        """A lease runs out; its holder may be dead, or asleep."""
        if self.holders:
            self.ledger.leases.expire(self.holders[index % len(self.holders)].id)  # type: ignore[attr-defined]

    @rule(index=st.integers(0, 5))
    def finish(self, index: int) -> None:
        self._end(index, lambda r, h: model.succeed(r, h.digest, fence=h.lease.fence, now_ns=time.time_ns()))

    @rule(index=st.integers(0, 5))
    def retry(self, index: int) -> None:
        """A retryable error: another attempt, or the end if this was the last."""

        def step(record: job_pb2.JobRecord, holder: Holder) -> job_pb2.JobRecord:
            now_ns, fence = time.time_ns(), holder.lease.fence
            if record.job.attempt >= BOUNDS.attempts_max:
                return model.fail(record, job_pb2.Failure(reason="X"), now_ns=now_ns, fence=fence, is_dead=True)
            return model.requeue(record, "again", now_ns=now_ns, fence=fence)

        self._end(index, step)

    @rule(index=st.integers(0, 5))
    def obey_a_cancel(self, index: int) -> None:
        self._end(index, lambda r, h: model.stop(r, fence=h.lease.fence, now_ns=time.time_ns()))

    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        for record in self._run(self.ledger.records())[0]:
            if record.request_id == name:
                job = self._run(self.ledger.cancel(record.job.id))
                if job.state in (model.CANCELLING, model.CANCELLED):
                    self.cancelled.add(job.id)

    @rule(which=st.integers(0, 1))
    def sweep(self, which: int) -> None:
        self._run(self.sweepers[which].sweep())

    @rule(index=st.integers(0, 5), workers=st.integers(0, 2), lost=st.booleans())
    def sweep_twice_while_workers_take(self, index: int, workers: int, lost: bool) -> None:
        """Everything at once, interleaved at every call of the bus; `lost`: the leases have just expired."""
        if lost:
            self._expire_all()
        messages = [self.seen[index % len(self.seen)]] * workers if self.seen else []

        async def all_at_once() -> None:
            sweeps = [sweeper.sweep() for sweeper in self.sweepers]
            await asyncio.gather(*sweeps, *(self._take(message) for message in messages))

        self._run(all_at_once())

    @invariant()
    def what_ended_stays_ended_and_tokens_grow(self) -> None:
        for record in self._run(self.ledger.records())[0]:
            id, stored = record.job.id, record.SerializeToString(deterministic=True)
            if record.job.state in model.FINAL:
                assert self.ends.setdefault(id, stored) == stored
            assert record.fence >= self.fences.get(id, 0)
            self.fences[id] = record.fence
            assert record.job.attempt <= BOUNDS.attempts_max
            if record.job.state == model.SUCCEEDED:
                assert record.job.result_digest == f"sha256:{record.fence:064x}", "a late holder wrote the result"
            if id in self.cancelled:
                assert record.job.state in (model.CANCELLING, model.CANCELLED), "a cancelled job came back"

    def teardown(self) -> None:
        """After the chaos: leases run out, sweepers sweep, one honest worker works. Everything must end."""
        if not hasattr(self, "bus"):
            return
        for _ in range(4 * BOUNDS.attempts_max):
            self._expire_all()
            self.holders.clear()
            self._run(self.sweepers[0].sweep())
            for message in list(self.bus.queued):
                self._run(self._take(message))
            for index in range(len(self.holders)):
                self._end(index, lambda r, h: model.succeed(r, h.digest, fence=h.lease.fence, now_ns=time.time_ns()))
        records = self._run(self.ledger.records())[0]
        self.runner.close()
        assert all(record.job.state in model.FINAL for record in records)

    def _expire_all(self) -> None:
        for holder in self.holders:
            self.ledger.leases.expire(holder.id)  # type: ignore[attr-defined]

    async def _take(self, message: Published) -> None:
        """What a worker does with a message, as in `smeltkit.jobs.worker`."""
        id = message.body.decode()
        record = await self.ledger.read(id)
        if record.job.state == model.QUEUED:
            lease = await acquire(self.ledger.leases, id, BOUNDS.lease_ttl_s)
            if lease is None:
                return
            try:
                await self.ledger.change(id, lambda r: model.claim(r, fence=lease.fence, now_ns=time.time_ns()))
            except (IllegalTransition, LeaseLost):
                await lease.release()
                return
            self.holders.append(Holder(id, lease))
        if message in self.bus.queued:
            self.bus.queued.remove(message)

    def _end(self, index: int, step: Callable[[job_pb2.JobRecord, Holder], job_pb2.JobRecord]) -> None:
        if not self.holders:
            return
        holder = self.holders[index % len(self.holders)]

        async def work() -> None:
            try:
                record = await self.ledger.change(holder.id, lambda record: step(record, holder))
            except (LeaseLost, IllegalTransition, RevisionConflict):
                return
            if record.job.state == model.QUEUED:
                await self.ledger.dispatch(record)
            await holder.lease.release()

        self._run(work())


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestLedgerMachine = LedgerMachine.TestCase
