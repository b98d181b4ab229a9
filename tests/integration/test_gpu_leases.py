"""Leases of GPU memory on a fake table of devices: races, dead holders, order, eviction."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from uuid import uuid4

import pytest
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.bus import Bus
from smeltkit.bus.leases import acquire
from smeltkit.errors import GpuBusy, LeaseLost, OutOfMemory, ProcessLost
from smeltkit.gpus import holders
from smeltkit.gpus.ledger import WAITING, GpuLedger, Lease, Want
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.jobs.ledger import JobLedger, LedgerBus
from smeltkit.testing.bus import MemoryBus
from smeltkit.testing.gpus import FakeDevices, gpu
from smeltkit.testing.waiting import eventually

WANT = Want(title="tiny", memory_bytes=60, is_shared=True)


class Rig:
    """Jobs and GPUs on one bus; `devices` is what this machine has."""

    def __init__(self, bus: LedgerBus) -> None:
        self.bus, self.jobs = bus, JobLedger(bus)
        self.devices = FakeDevices(gpu(f"GPU-{uuid4().hex}"))
        self.gpus = GpuLedger(bus, self.jobs, self.devices)

    async def attempt(self) -> JobContext:
        """A running attempt at a new job."""
        request = job_pb2.GetJobRequest(id="x")
        job = await self.jobs.start(service="trainer", kind="train", request=request, request_id=uuid4().hex)
        return await self.claim(job.id)

    async def claim(self, id: str) -> JobContext:
        """The next attempt at a queued job."""
        lease = await acquire(self.jobs.leases, id, self.jobs.bounds.lease_ttl_s)
        assert lease is not None
        record = await self.jobs.change(id, lambda one: model.claim(one, fence=lease.fence, now_ns=time.time_ns()))
        return JobContext(self.jobs, record)

    async def lose(self, context: JobContext) -> None:
        """Ends an attempt as the sweeper does when its worker is dead: the job is queued again."""
        entry = await self.jobs.leases.get(context.job_id)
        assert entry is not None
        await self.jobs.leases.delete(context.job_id, entry.revision)
        await self.jobs.change(context.job_id, lambda one: model.requeue(one, "worker lost", now_ns=time.time_ns()))


@pytest.fixture
def rig() -> Rig:
    """On buckets in memory, where every call lets others go first."""
    return Rig(MemoryBus())


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's processes are looked for: a thousand looks at /proc are slow."""
    monkeypatch.setattr(holders, "pids_of", lambda holder: [])


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts; ended after it."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for one in started:
        one.kill()
        one.wait()


def working(context: JobContext, started: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A process that works under an attempt's lease."""
    return waiting(f"{context.job_id}.{context.fence}", started)


def waiting(last_argument: str, started: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A process that does nothing."""
    started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", last_argument]))
    return started[-1]


async def race(rig: Rig, contexts: list[JobContext]) -> int:
    """How many of the attempts get what each of them asks for at the same time."""
    is_over = asyncio.Event()
    done = 0

    async def ask(context: JobContext) -> bool:
        nonlocal done
        try:
            async with rig.gpus.held(context, WANT):
                done += 1
                if done == len(contexts):
                    is_over.set()
                await is_over.wait()
                return True
        except GpuBusy:
            done += 1
            if done == len(contexts):
                is_over.set()
            return False

    return sum(await asyncio.gather(*map(ask, contexts)))


async def test_of_two_claims_on_the_last_bytes_one_wins_a_thousand_times(rig: Rig, no_processes: None) -> None:
    """R-114: exactly one of two, in each of 1,000 tries; afterwards nothing is leased."""
    contexts = [await rig.attempt(), await rig.attempt()]
    assert [await race(rig, contexts) for _ in range(1000)] == [1] * 1000
    assert (await rig.gpus.standing()).claims == ()


async def test_of_three_claims_on_real_nats_one_wins(bus: Bus, no_processes: None) -> None:
    """R-114: the same on the real bucket."""
    rig = Rig(bus)
    contexts = [await rig.attempt() for _ in range(3)]
    assert [await race(rig, contexts) for _ in range(10)] == [1] * 10


async def test_a_refusal_names_the_holder_and_the_remedy(rig: Rig) -> None:
    first, second = await rig.attempt(), await rig.attempt()
    async with rig.gpus.held(first, Want(title="big:model", memory_bytes=10)):
        with pytest.raises(GpuBusy, match=rf"{first.job_id} \(big:model\) holds it.*--wait-gpu"):
            async with rig.gpus.held(second, WANT):
                pass
        with pytest.raises(GpuBusy):
            await rig.gpus.check(WANT)
    assert (await rig.gpus.check(WANT)).devices == (rig.devices.now[0].id,)


async def test_a_gpu_on_which_somebody_computes_without_a_lease_is_not_given(
    rig: Rig, process: list[subprocess.Popen[bytes]]
) -> None:
    """R-117: it may serve an evaluation; not for any budget, unless whoever runs the platform says so."""
    stranger = waiting("no lease", process)
    free = rig.devices.now[0]
    rig.devices.now = (replace(free, used_bytes=1, processes={stranger.pid: 1, 2**22 + 1: 1}),)
    with pytest.raises(GpuBusy, match=f"process {stranger.pid} computes there without a lease"):
        async with rig.gpus.held(await rig.attempt(), WANT):
            pass
    asked = GpuLedger(rig.bus, rig.jobs, rig.devices, beside_strangers=True)
    assert (await asked.check(WANT)).devices == (free.id,)
    stranger.kill()
    stranger.wait()
    rig.devices.now = (free,)
    async with rig.gpus.held(context := await rig.attempt(), WANT) as lease:
        own = working(context, process)
        rig.devices.now = (replace(free, used_bytes=30, processes={own.pid: 30}),)
        assert (await rig.gpus.check(replace(WANT, memory_bytes=30))).devices == lease.devices
        own.kill()
        own.wait()


async def test_several_partitions_are_no_place_for_one_training(rig: Rig) -> None:
    """A process sees the first partition only; alone it is a device like any other."""
    rig.devices.now = tuple(gpu(f"MIG-{uuid4().hex}", whole="GPU-0") for _ in range(2))
    assert len((await rig.gpus.check(WANT)).devices) == 1
    with pytest.raises(OutOfMemory, match="no whole GPU"):
        await rig.gpus.check(replace(WANT, count=2))


async def test_what_no_device_can_hold_is_refused_whether_one_waits_or_not(rig: Rig) -> None:
    with pytest.raises(OutOfMemory, match="this machine has"):
        async with rig.gpus.held(await rig.attempt(), Want(title="tiny", memory_bytes=101, waits=True)):
            pass
    with pytest.raises(OutOfMemory):
        await rig.gpus.check(Want(title="tiny", memory_bytes=10, count=2))


async def test_memory_that_others_use_without_a_lease_is_not_leased(rig: Rig) -> None:
    rig.devices.now = (gpu(used=41),)
    with pytest.raises(GpuBusy, match="free"):
        await rig.gpus.check(WANT)


async def test_a_machine_without_gpus_leases_nothing_and_trains(rig: Rig) -> None:
    rig.devices.now = ()
    async with rig.gpus.held(await rig.attempt(), WANT) as lease:
        assert lease.environment == {} and lease.holder == ""


@pytest.fixture
async def held(rig: Rig) -> AsyncIterator[tuple[JobContext, asyncio.Event]]:
    """An attempt that holds the device until the event is set."""
    context, is_held, leave = await rig.attempt(), asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with rig.gpus.held(context, WANT):
            is_held.set()
            await leave.wait()

    holding = asyncio.create_task(hold())
    await is_held.wait()
    yield context, leave
    leave.set()
    await holding


async def test_who_waits_is_told_who_holds_and_gets_its_turn_in_order(
    rig: Rig, held: tuple[JobContext, asyncio.Event]
) -> None:
    """Woken by the table itself; a small claim that came later does not overtake."""
    contexts, order = [await rig.attempt() for _ in range(3)], list[int]()

    async def ask(number: int, memory_bytes: int) -> None:
        want = Want(title=f"n{number}", memory_bytes=memory_bytes, is_shared=True, waits=True)
        async with rig.gpus.held(contexts[number], want):
            order.append(number)

    async with asyncio.TaskGroup() as group:
        for number, memory_bytes in enumerate((90, 10, 90)):
            group.create_task(ask(number, memory_bytes))
            await eventually(lambda number=number: contexts[number].latest.phase == WAITING)  # type: ignore[misc]
        assert held[0].job_id in contexts[0].latest.message
        assert "2 before it" in contexts[2].latest.message and contexts[0].job_id in contexts[2].latest.message
        with pytest.raises(GpuBusy, match="3 before it"):
            await rig.gpus.check(Want(title="late", memory_bytes=1, is_shared=True))
        held[1].set()
    assert order == [0, 1, 2]
    assert (await rig.gpus.standing()).claims == ()


async def test_who_is_cancelled_while_it_waits_leaves_the_queue(
    rig: Rig, held: tuple[JobContext, asyncio.Event]
) -> None:
    context = await rig.attempt()

    async def ask() -> None:
        async with rig.gpus.held(context, Want(title="tiny", memory_bytes=60, waits=True)):
            raise AssertionError("it must not get its turn")

    asking = asyncio.create_task(ask())
    await eventually(lambda: context.latest.phase == WAITING)
    assert len((await rig.gpus.standing()).claims) == 2
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert [one.job_id for one in (await rig.gpus.standing()).claims] == [held[0].job_id]


async def test_memory_of_a_dead_holder_is_free_once_its_process_is_gone(
    rig: Rig, process: list[subprocess.Popen[bytes]]
) -> None:
    """R-115: a lease ends with its attempt; the process left behind is ended before anybody gets its bytes."""
    dead, heir = await rig.attempt(), await rig.attempt()
    left_over = working(dead, process)
    leaving = rig.gpus.held(dead, WANT)
    await leaving.__aenter__()
    await rig.lose(dead)
    async with rig.gpus.held(heir, Want(title="tiny", memory_bytes=60, is_shared=True, waits=True)):
        assert left_over.wait(10) == -9
        assert [one.holder for one in (await rig.gpus.standing()).claims] == [f"{heir.job_id}.{heir.fence}"]
    with pytest.raises(LeaseLost):
        async with rig.gpus.held(dead, WANT):
            pass
    await leaving.__aexit__(None, None, None)


async def test_the_next_attempt_at_a_job_takes_over_from_the_last(
    rig: Rig, process: list[subprocess.Popen[bytes]]
) -> None:
    """R-115: the older token is fenced; its process goes, that of the newer attempt stays."""
    first = await rig.attempt()
    old = working(first, process)
    leaving = rig.gpus.held(first, WANT)
    await leaving.__aenter__()
    await rig.lose(first)
    second = await rig.claim(first.job_id)
    new = working(second, process)
    async with rig.gpus.held(second, Want(title="tiny", memory_bytes=60, is_shared=True, waits=True)):
        assert old.wait(10) == -9
        assert new.poll() is None
        new.kill()
        new.wait()
    await leaving.__aexit__(None, None, None)


async def test_who_takes_more_than_it_shares_is_ended_and_its_neighbour_goes_on(
    rig: Rig, process: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-116: only processes of that lease are ended, and its error says by how much it was too much."""
    monkeypatch.setattr(limits, "GPU_SAMPLE_PERIOD_S", 0.01)
    greedy, quiet = await rig.attempt(), await rig.attempt()
    offender, neighbour = working(greedy, process), working(quiet, process)
    half = Want(title="tiny", memory_bytes=40, is_shared=True)
    device = rig.devices.now[0].id

    async def train(lease: Lease) -> None:
        code = await asyncio.to_thread(offender.wait, 20)
        raise ProcessLost(f"killed by signal {-code}")

    async with rig.gpus.held(quiet, half) as beside:
        with pytest.raises(OutOfMemory, match="--vram"):
            async with rig.gpus.held(greedy, half) as lease:
                used = {f"p{offender.pid}": 50, f"p{neighbour.pid}": 40}
                rig.devices.now = (gpu(device, used=90, **used),)
                await train(lease)
        assert neighbour.poll() is None and not beside.has_exceeded
        await eventually(lambda: beside.peak_bytes == 40)
        neighbour.kill()
        neighbour.wait()


async def test_what_a_run_took_is_known_to_the_next_of_its_kind(rig: Rig) -> None:
    assert await rig.gpus.peak("0" * 64) == 0
    for peak_bytes in (40, 50):
        await rig.gpus.learn("0" * 64, peak_bytes)
    assert await rig.gpus.peak("0" * 64) == 50


async def test_a_device_is_free_once_its_memory_is_back_where_it_was(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-118: what the driver gives back late is waited for; the next one then finds all of it."""
    monkeypatch.setattr(limits, "GPU_LEFT_BYTES", 0)
    context, device = await rig.attempt(), rig.devices.now[0].id
    own = Want(title="tiny", memory_bytes=60)
    leave = asyncio.Event()

    async def train() -> None:
        async with rig.gpus.held(context, own):
            rig.devices.now = (gpu(device, used=55),)
            await leave.wait()

    rig.devices.now = (gpu(device, used=5),)
    training = asyncio.create_task(train())
    await eventually(lambda: rig.devices.now[0].used_bytes == 55)
    leave.set()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(training), 0.3)
    assert [one.job_id for one in (await rig.gpus.standing()).claims] == [context.job_id]
    rig.devices.now = (gpu(device, used=5),)
    await training
    assert (await rig.gpus.standing()).claims == ()


async def test_memory_that_never_comes_back_is_told_and_stays_taken(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """R-118: the lease ends, since its processes did; the bytes count as in use by others."""
    monkeypatch.setattr(limits, "GPU_LEFT_BYTES", 0)
    monkeypatch.setattr(limits, "GPU_RELEASE_WAIT_S", 0.0)
    context, device = await rig.attempt(), rig.devices.now[0].id
    async with rig.gpus.held(context, Want(title="tiny", memory_bytes=60)):
        rig.devices.now = (gpu(device, used=55),)
    assert f"{context.job_id} left memory of GPUs in use" in caplog.text
    assert (await rig.gpus.standing()).claims == ()
    with pytest.raises(GpuBusy, match="needs 0.0 GiB"):
        await rig.gpus.check(WANT)


async def test_what_is_over_is_not_shown_as_holding(rig: Rig) -> None:
    """R-120: leases of a worker that died are those of nobody, before anybody asks for the device."""
    dead = await rig.attempt()
    leaving = rig.gpus.held(dead, WANT)
    await leaving.__aenter__()
    assert len((await rig.gpus.standing()).claims) == 1
    await rig.lose(dead)
    assert (await rig.gpus.standing()).claims == ()
    await leaving.__aexit__(None, None, None)
