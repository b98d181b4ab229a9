"""All slots of this service: who gets one, what is tried again, and how a lost one comes back.

An infrastructure failure is retried once on another slot and never counted against the candidate.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from services.sandbox.client import SlotClient, SlotLost
from services.sandbox.config import SandboxConfig
from services.sandbox.job import Job
from services.sandbox.policy import CODE_MAX_BYTES
from services.sandbox.supervisor.spec import SlotSpec
from services.sandbox.verdict import Record, Verdict
from smeltkit.errors import TooManyRequests

_LOG = logging.getLogger(__name__)
NEAR_LIMIT_SHARE: Final = 0.7
"""A failure with more of its CPU limit used than this is run again when the request asks for it."""
WAITED_SHARE: Final = 0.2
"""A wall timeout is run again only if it waited for a core for more of its time than this: sleepers buy nothing."""
RETRY_AFTER_S: Final = 1.0
REBUILD_DELAY_S: Final = 1.0


class Pool:
    """The slots. `start` before use, `stop` at the end; on one event loop."""

    def __init__(self, specs: Sequence[SlotSpec], config: SandboxConfig) -> None:
        self._config = config
        self._clients = [SlotClient(spec) for spec in specs]
        self._idle: asyncio.LifoQueue[SlotClient] = asyncio.LifoQueue()
        self._waiting = 0
        self._alone = asyncio.Lock()
        self._repairs: set[asyncio.Task[None]] = set()

    @property
    def slots(self) -> int:
        """Candidates that run at once."""
        return len(self._clients)

    @property
    def profile_digests(self) -> Mapping[str, str]:
        """Digest of each profile: interpreter and packages."""
        return self._clients[0].spec.profile_digests

    @property
    def supervisor_pids(self) -> list[int]:
        """Pids of the supervisors, for tests that end them."""
        return [client.pid for client in self._clients]

    async def start(self) -> None:
        """Builds every slot; IsolationTooWeak, SlotLost."""
        await asyncio.gather(*(client.start() for client in self._clients))
        for client in self._clients:
            self._idle.put_nowait(client)

    async def stop(self) -> None:
        """Ends every slot and everything that runs in it."""
        for repair in self._repairs:
            repair.cancel()
        await asyncio.gather(*(client.stop() for client in self._clients))

    async def run(self, job: Job, *, rerun: bool = False, can_wait: bool = False) -> Record:
        """The record of `job`, with retries. TooManyRequests if the queue is full and not `can_wait`; BadCode."""
        if len(job.code) > CODE_MAX_BYTES:
            return self._too_long(job)
        record = await self._attempt(job, can_wait=can_wait)
        if record.verdict is Verdict.INFRA:
            again = await self._attempt(job, can_wait=True)
            record = again.after(record)
        if rerun and is_worth_a_rerun(record):
            again = await self._run_alone(job)
            record = again.after(record)
        return record

    def _too_long(self, job: Job) -> Record:
        """The record of a candidate that is not run at all."""
        spec = self._clients[0].spec
        return Record(
            verdict=Verdict.OUTPUT_LIMIT,
            detail=f"code of {len(job.code)} bytes; at most {CODE_MAX_BYTES} are run",
            mode="stdio" if job.is_program else job.mode,
            level=spec.level,
            missing_layers=list(spec.missing_layers),
            limits=job.limits,
            judge_digest=spec.judge_digest,
            profile_digest=spec.profile_digests[job.profile],
        )

    async def _attempt(self, job: Job, *, can_wait: bool) -> Record:
        if not can_wait and self._idle.empty() and self._waiting >= self.slots * self._config.queue_per_slot:
            raise TooManyRequests(
                f"{self._waiting} requests wait for {self.slots} slots; try again later or use JudgeBatch",
                retry_after_s=RETRY_AFTER_S,
            )
        async with self._slot() as client:
            return await self._run_on(client, job)

    async def _run_alone(self, job: Job) -> Record:
        """Runs while every other slot is idle."""
        async with self._alone, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self._slot()) for _ in range(self.slots)]
            return await self._run_on(clients[0], job)

    async def _run_on(self, client: SlotClient, job: Job) -> Record:
        """A slot that fails is built anew, so that what is tried again runs elsewhere."""
        load = os.getloadavg()[0]
        try:
            record = await client.run(job)
        except SlotLost as error:
            _LOG.warning("slot lost", extra={"slot": client.spec.index, "error": str(error)})
            record = Record(verdict=Verdict.INFRA, detail=str(error), level=client.spec.level, limits=job.limits)
        client.is_sound = record.verdict is not Verdict.INFRA
        record.load = load
        return record

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[SlotClient]:
        self._waiting += 1
        try:
            client = await self._idle.get()
            while not client.is_alive:
                self._repair(client)
                client = await self._idle.get()
        finally:
            self._waiting -= 1
        try:
            yield client
        finally:
            if client.is_sound and client.runs < self._config.runs_per_slot:
                self._idle.put_nowait(client)
            else:
                self._repair(client)

    def _repair(self, client: SlotClient) -> None:
        repair = asyncio.ensure_future(self._rebuild(client))
        self._repairs.add(repair)
        repair.add_done_callback(self._repairs.discard)

    async def _rebuild(self, client: SlotClient) -> None:
        """Builds the slot again, for as long as it takes; meanwhile the others work."""
        while True:
            await client.stop()
            try:
                await client.start()
            except Exception:
                _LOG.exception("slot cannot be built", extra={"slot": client.spec.index})
                await asyncio.sleep(REBUILD_DELAY_S)
                continue
            self._idle.put_nowait(client)
            return


def is_worth_a_rerun(record: Record) -> bool:
    """Whether a failure may be the neighbours' doing: near the CPU limit, or starved at the wall."""
    if record.verdict in (Verdict.PASSED, Verdict.INFRA):
        return False
    if record.verdict is Verdict.TIMEOUT_WALL:
        return record.waited_share > WAITED_SHARE
    return record.cpu_s > NEAR_LIMIT_SHARE * record.limits.cpu_s
