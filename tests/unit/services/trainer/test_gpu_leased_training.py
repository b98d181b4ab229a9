"""Leases of a real GPU, on real NATS: what the driver tells, a training under a lease, one that takes too much."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from smelt.job.v1 import job_pb2
from training_files import write_spec

from services.trainer.parallel.launch import TrainingProcesses
from smeltkit import limits
from smeltkit.bus import Bus
from smeltkit.bus.leases import acquire
from smeltkit.config import environment
from smeltkit.errors import GpuBusy, OutOfMemory, ProcessLost
from smeltkit.gpus import holders
from smeltkit.gpus.devices import NvidiaSmi
from smeltkit.gpus.ledger import GpuLedger, Lease, Want
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.jobs.ledger import JobLedger
from smeltkit.testing.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GREEDY = "import time, torch; held = torch.ones(6 << 30, dtype=torch.uint8, device='cuda'); time.sleep(600)"


Greedy = Callable[[Lease], "subprocess.Popen[bytes]"]


@pytest.fixture
def greedy() -> Iterator[Greedy]:
    """Starts a process that takes 6 GiB of a GPU under a lease; all are ended after the test."""
    with ExitStack() as stack:

        def start(lease: Lease) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", GREEDY, lease.holder]
            process = stack.enter_context(subprocess.Popen(command, env=environment(lease.environment)))
            stack.callback(process.kill)
            return process

        yield start


async def _attempt(jobs: JobLedger) -> JobContext:
    """A running attempt at a new job."""
    request = job_pb2.GetJobRequest(id="x")
    job = await jobs.start(service="trainer", kind="train", request=request, request_id=uuid4().hex)
    lease = await acquire(jobs.leases, job.id, jobs.bounds.lease_ttl_s)
    assert lease is not None
    record = await jobs.change(job.id, lambda one: model.claim(one, fence=lease.fence, now_ns=time.time_ns()))
    return JobContext(jobs, record)


def _of_torch(expression: str) -> Any:
    """What torch says, in a process of its own: this one must not be on a GPU, where it had no lease."""
    code = f"import json, torch; print(json.dumps({expression}))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def test_the_driver_tells_what_torch_sees() -> None:
    """Every device with its bytes, as torch counts them but for what the driver keeps to itself."""
    each = "(p.name, str(p.uuid), p.total_memory)"
    of_all = "(torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count()))"
    devices, told = NvidiaSmi().read(), _of_torch(f"[{each} for p in {of_all}]")
    assert len(devices) == len(told) > 0
    for device, (name, uuid, total_bytes) in zip(devices, told, strict=True):
        assert device.name == name and uuid in device.id
        assert 0 <= device.total_bytes - total_bytes < 2 * limits.GIB
        assert 0 <= device.used_bytes < device.total_bytes


async def test_a_training_has_a_gpu_of_its_own_while_it_runs(bus: Bus, tmp_path: Path) -> None:
    """R-114, R-115, R-118: its processes and their bytes are seen, others are refused, then all of it is free."""
    jobs = JobLedger(bus)
    gpus, first, second = GpuLedger(bus, jobs, NvidiaSmi()), await _attempt(jobs), await _attempt(jobs)
    write_spec(tmp_path, "run", method="full", dtype="bfloat16", pack_tokens=256)
    want = Want(title="tiny", memory_bytes=4 * limits.GIB, count=torch.cuda.device_count())
    async with gpus.held(first, want) as lease:
        training = TrainingProcesses("train_process", tmp_path / "run", 1, lease)
        with pytest.raises(GpuBusy, match=rf"{first.job_id} \(tiny\) holds it"):
            async with gpus.held(second, want):
                pass
        seen, used = set[int](), 0
        while training.are_running():
            standing = await gpus.standing()
            (claim,) = standing.claims
            seen |= set(holders.pids_of(lease.holder))
            used = max(used, *(standing.uses(device, claim) for device in standing.devices))
            await asyncio.sleep(0.1)
        training.stop()
    assert "reason" not in training.outcome() and training.outcome()["device"].startswith("NVIDIA")
    assert training.pid in seen and 100 * limits.MIB < used <= want.memory_bytes
    assert 100 * limits.MIB < lease.peak_bytes < want.memory_bytes
    assert (await gpus.standing()).claims == ()
    assert (await gpus.check(want)).devices == lease.devices


async def test_who_takes_more_than_its_share_is_ended_and_nobody_else(bus: Bus, greedy: Greedy) -> None:
    """R-116: two share a GPU; the one that takes 6 GiB and may take 2 is ended, its neighbour goes on."""
    jobs = JobLedger(bus)
    gpus, first, second = GpuLedger(bus, jobs, NvidiaSmi()), await _attempt(jobs), await _attempt(jobs)
    small = Want(title="greedy", memory_bytes=2 * limits.GIB, is_shared=True)
    async with gpus.held(first, Want(title="kept", memory_bytes=8 * limits.GIB, is_shared=True)) as kept:
        good = greedy(kept)
        with pytest.raises(OutOfMemory, match="used .* and may share 2.0 GiB"):
            async with gpus.held(second, small) as lease:
                assert await asyncio.to_thread(greedy(lease).wait, 120) == -signal.SIGKILL
                raise ProcessLost("ended")
        assert good.poll() is None
        await eventually(lambda: kept.peak_bytes > 6 * limits.GIB)
        good.kill()
    assert kept.peak_bytes < 8 * limits.GIB
