"""Who may take how much of which GPU, and what the driver's program says of them: without a GPU and without NATS."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smeltkit import limits
from smeltkit.gpus.claims import Claim, ahead_of, left_bytes, place
from smeltkit.gpus.devices import Device, NvidiaSmi
from smeltkit.testing.gpus import FakeNvidiaSmi, gpu

CLAIM = Claim(
    holder="job-a.1", title="tiny", memory_bytes=60, count=1, is_shared=False, among=("GPU-0", "GPU-1"), since_s=1.0
)


def holding(device: str, *, is_shared: bool, memory_bytes: int = 30) -> Claim:
    """Another claim that holds a device."""
    return replace(CLAIM, holder="job-b.1", is_shared=is_shared, memory_bytes=memory_bytes, devices=(device,))


def test_a_device_is_shared_only_by_those_who_all_said_so() -> None:
    """Beside a training without a budget nothing else gets in, however much room is left."""
    shared, own = replace(CLAIM, is_shared=True), CLAIM
    left = {"GPU-0": 70}
    assert place(shared, [holding("GPU-0", is_shared=True)], left) == ("GPU-0",)
    assert place(own, [holding("GPU-0", is_shared=True)], left) == ()
    assert place(shared, [holding("GPU-0", is_shared=False)], left) == ()


def test_one_that_shares_fills_up_and_one_that_does_not_spreads_out() -> None:
    left = {"GPU-0": 90, "GPU-1": 70}
    assert place(replace(CLAIM, is_shared=True), [], left) == ("GPU-1",)
    assert place(CLAIM, [], left) == ("GPU-0",)


def test_several_devices_are_given_together_or_not_at_all() -> None:
    pair = replace(CLAIM, count=2)
    assert place(pair, [], {"GPU-0": 90, "GPU-1": 70}) == ("GPU-0", "GPU-1")
    assert place(pair, [], {"GPU-0": 90, "GPU-1": 59}) == ()


def test_what_is_left_leaves_out_leases_reserve_and_what_nobody_leased() -> None:
    """Of 50 bytes in use 20 are those of a lease of 30, and are not counted twice."""
    device = gpu(used=50)
    left = left_bytes(device, [holding("GPU-0", is_shared=True)], lambda device, claim: 20, reserve_bytes=5)
    assert left == 100 - 5 - 30 - 30


def test_nobody_is_overtaken_by_a_later_claim_on_the_same_devices() -> None:
    """Fair order: who asked first stands before, unless it wants other devices or holds its own already."""
    first, second = replace(CLAIM, holder="job-1.1"), replace(CLAIM, holder="job-2.1", memory_bytes=1)
    elsewhere = replace(CLAIM, holder="job-3.1", among=("GPU-9",))
    table = [first, elsewhere, second]
    assert ahead_of(second, table) == [first]
    assert ahead_of(elsewhere, table) == []
    assert ahead_of(first, table) == []
    assert ahead_of(second, [replace(first, devices=("GPU-0",)), second]) == []


@pytest.fixture
def smi(tmp_path: Path) -> FakeNvidiaSmi:
    """A program that answers as the driver's does."""
    return FakeNvidiaSmi(tmp_path)


def test_devices_and_their_processes_are_read_from_the_drivers_program(smi: FakeNvidiaSmi) -> None:
    devices = [
        Device(id=f"GPU-{n}", name="NVIDIA H200", total_bytes=140 * limits.GIB, used_bytes=n * limits.GIB, processes=p)
        for n, p in ((0, {}), (1, {41: limits.GIB, 42: 2 * limits.GIB}))
    ]
    smi.tell(*devices)
    assert NvidiaSmi(str(smi.program)).read() == tuple(devices)
    assert NvidiaSmi(str(smi.program), visible="1").read() == (devices[1],)
    assert NvidiaSmi(str(smi.program), visible="GPU-0").read() == (devices[0],)


def test_of_a_partitioned_gpu_its_partitions_are_devices(smi: FakeNvidiaSmi) -> None:
    """Each with its own memory and processes, also where only one is visible, beside a whole GPU."""
    whole = gpu(total=4 * limits.GIB)
    parts = [gpu(f"MIG-{n}", total=16 * limits.GIB, used=n * limits.GIB, whole="GPU-1", p7=limits.GIB) for n in (0, 1)]
    smi.tell(whole, *parts)
    assert NvidiaSmi(str(smi.program)).read() == (whole, *parts)
    assert NvidiaSmi(str(smi.program), visible="GPU-1").read() == tuple(parts)
    assert NvidiaSmi(str(smi.program), visible="MIG-1").read() == (parts[1],)


def test_what_shares_the_memory_of_a_partition_is_left_out(
    smi: FakeNvidiaSmi, caplog: pytest.LogCaptureFixture
) -> None:
    """Two compute instances of one GPU instance; what cannot be read is said and is no device."""
    smi.tell(gpu("MIG-0", whole="GPU-1"), gpu("MIG-1", whole="GPU-1"), gpu("MIG-2", whole="GPU-1"))
    tree = smi.program.parent / "all.xml"
    tree.write_text(tree.read_text().replace("<gpu_instance_id>8<", "<gpu_instance_id>7<"))
    assert [one.id for one in NvidiaSmi(str(smi.program)).read()] == ["MIG-2"]
    tree.write_text("none of it")
    assert NvidiaSmi(str(smi.program)).read() == () and "partitions of GPUs are not known" in caplog.text


def test_what_tells_no_sizes_and_a_missing_program_are_no_devices(smi: FakeNvidiaSmi) -> None:
    (smi.program.parent / "gpus.csv").write_text("GPU-0, NVIDIA H200, [N/A], [Insufficient Permissions], Disabled\n")
    assert NvidiaSmi(str(smi.program)).read() == ()
    assert NvidiaSmi("/nowhere/nvidia-smi").read() == ()
