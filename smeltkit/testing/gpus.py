"""GPUs on a machine that has none: as values that a test sets, or as a program that answers like the driver's own."""

from __future__ import annotations

from pathlib import Path

from smeltkit import limits
from smeltkit.gpus.devices import Device


class FakeDevices:
    """Tells of the devices in `now`, which a test may replace at any time."""

    def __init__(self, *devices: Device) -> None:
        self.now = devices

    def read(self) -> tuple[Device, ...]:
        """The devices of the moment."""
        return self.now


def gpu(id: str = "GPU-0", *, total: int = 100, used: int = 0, **processes: int) -> Device:
    """A device of `total` bytes; `processes` are named p<pid>."""
    told = {int(name.removeprefix("p")): size for name, size in processes.items()}
    return Device(id=id, name="NVIDIA Test", total_bytes=total, used_bytes=used, processes=told)


class FakeNvidiaSmi:
    """A program in `folder` that tells of GPUs as `nvidia-smi` does, whatever was written last."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "nvidia-smi"
        self._gpus, self._processes = folder / "gpus.csv", folder / "processes.csv"
        self.program.write_text(f'#!/bin/sh\ncase "$1" in *gpu=*) cat {self._gpus};; *) cat {self._processes};; esac\n')
        self.program.chmod(0o755)
        self.tell()

    def tell(self, *devices: Device) -> None:
        """From now on these are the GPUs of the machine."""
        rows = [f"{one.id}, {one.name}, {_mib(one.total_bytes)}, {_mib(one.used_bytes)}" for one in devices]
        used = [f"{one.id}, {pid}, {_mib(size)}" for one in devices for pid, size in one.processes.items()]
        self._processes.write_text("".join(f"{row}\n" for row in used))
        self._gpus.write_text("".join(f"{row}\n" for row in rows))


def _mib(size_bytes: int) -> int:
    return size_bytes // limits.MIB
