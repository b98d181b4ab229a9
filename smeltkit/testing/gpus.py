"""GPUs on a machine that has none: as values that a test sets, or as a program that answers like the driver's own."""

from __future__ import annotations

from collections.abc import Sequence
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


def gpu(id: str = "GPU-0", *, total: int = 100, used: int = 0, whole: str = "", **processes: int) -> Device:
    """A device of `total` bytes, or a partition of `whole`; `processes` are named p<pid>."""
    told = {int(name.removeprefix("p")): size for name, size in processes.items()}
    name = "NVIDIA Test MIG 1g.18gb" if whole else "NVIDIA Test"
    return Device(id=id, name=name, total_bytes=total, used_bytes=used, processes=told, whole=whole)


class FakeNvidiaSmi:
    """A program in `folder` that tells of GPUs as `nvidia-smi` does, whatever was written last."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "nvidia-smi"
        self._gpus, self._processes = folder / "gpus.csv", folder / "processes.csv"
        self._listing, self._xml = folder / "listing.txt", folder / "all.xml"
        files = {"*gpu=*": self._gpus, "*apps=*": self._processes, "-L": self._listing, "-q": self._xml}
        cases = " ".join(f"{pattern}) cat {file};;" for pattern, file in files.items())
        self.program.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
        self.program.chmod(0o755)
        self.tell()

    def tell(self, *devices: Device) -> None:
        """From now on these are the GPUs of the machine, and partitions of others."""
        whole = [one for one in devices if not one.whole]
        rows = [f"{one.id}, {one.name}, {_mib(one.total_bytes)}, {_mib(one.used_bytes)}, Disabled" for one in whole]
        used = [f"{one.id}, {pid}, {_mib(size)}" for one in whole for pid, size in one.processes.items()]
        listing, tree = [f"GPU {number}: {one.name} (UUID: {one.id})" for number, one in enumerate(whole)], ""
        for id, parts in _partitions(devices).items():
            rows.append(f"{id}, NVIDIA Test, 143771, [Insufficient Permissions], Enabled")
            listing.append(f"GPU {len(listing)}: NVIDIA Test (UUID: {id})")
            listing += [f"  MIG 1g.18gb     Device  {n}: (UUID: {part.id})" for n, part in enumerate(parts)]
            tree += _gpu_xml(id, parts)
        self._processes.write_text("".join(f"{row}\n" for row in used))
        self._listing.write_text("\n".join(listing))
        self._xml.write_text(f'<?xml version="1.0" ?>\n<nvidia_smi_log>{tree}</nvidia_smi_log>\n')
        self._gpus.write_text("".join(f"{row}\n" for row in rows))


def _partitions(devices: Sequence[Device]) -> dict[str, list[Device]]:
    """Partitioned GPUs with their partitions."""
    found: dict[str, list[Device]] = {}
    for one in devices:
        if one.whole:
            found.setdefault(one.whole, []).append(one)
    return found


def _gpu_xml(id: str, parts: Sequence[Device]) -> str:
    """What the driver's program tells of a partitioned GPU with `-q -x`, as far as it is read."""
    told = [
        f"<mig_device><index>{n}</index><gpu_instance_id>{n + 7}</gpu_instance_id>"
        f"<compute_instance_id>0</compute_instance_id><fb_memory_usage><total>{_mib(part.total_bytes)} MiB</total>"
        f"<reserved>0 MiB</reserved><used>{_mib(part.used_bytes)} MiB</used></fb_memory_usage></mig_device>"
        for n, part in enumerate(parts)
    ]
    used = [
        f"<process_info><gpu_instance_id>{n + 7}</gpu_instance_id><compute_instance_id>0</compute_instance_id>"
        f"<pid>{pid}</pid><type>C</type><used_memory>{_mib(size)} MiB</used_memory></process_info>"
        for n, part in enumerate(parts)
        for pid, size in part.processes.items()
    ]
    mode = "<mig_mode><current_mig>Enabled</current_mig></mig_mode>"
    return (
        f'<gpu id="00000000:00:06.0">{mode}<mig_devices>{"".join(told)}</mig_devices><uuid>{id}</uuid>'
        f"<processes>{''.join(used)}</processes></gpu>"
    )


def _mib(size_bytes: int) -> int:
    return size_bytes // limits.MIB
