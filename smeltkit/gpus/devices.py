"""The GPUs of this machine as facts: how much memory each has, how much is in use, and by which processes."""

from __future__ import annotations

import csv
import logging
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol
from xml.etree import ElementTree

from smeltkit import limits

_log = logging.getLogger(__name__)
_GPU_FIELDS: Final = ("uuid", "name", "memory.total", "memory.used", "mig.mode.current")
_PROCESS_FIELDS: Final = ("gpu_uuid", "pid", "used_memory")
_LISTED_GPU: Final = re.compile(r"GPU \d+: .* \(UUID: (GPU-[^)]+)\)")
_LISTED_PARTITION: Final = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (MIG-[^)]+)\)")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or a partition of one, as it is at this moment."""

    id: str
    """UUID that the driver gave it: it stays when devices are numbered anew."""
    name: str
    total_bytes: int
    used_bytes: int
    """In use by whomever."""
    processes: Mapping[int, int] = field(default_factory=dict)
    """Process id to the bytes it uses; empty where the driver does not tell, as in some containers."""
    whole: str = ""
    """UUID of the GPU that it is a partition of (MIG), with memory and cores of its own; empty for a GPU."""


class Devices(Protocol):
    """Tells of the GPUs that this process may use. Blocking."""

    def read(self) -> tuple[Device, ...]:
        """All of them, in the driver's order; empty where there is none."""


class NvidiaSmi:
    """The GPUs that the driver's own program tells of; of one that is partitioned (MIG) its partitions.

    How a GPU is partitioned is looked at, never changed. What shares a partition's memory, the compute instances of one
    GPU instance, is left out.
    """

    def __init__(self, program: str = "nvidia-smi", *, visible: str | None = None) -> None:
        """`visible`: numbers or UUIDs of those that may be used, as in CUDA_VISIBLE_DEVICES; None for all."""
        self._program = program
        self._visible = None if visible is None else [one.strip() for one in visible.split(",") if one.strip()]

    def read(self) -> tuple[Device, ...]:
        """The GPUs; empty, with a line in the log where it was there and failed, if the program tells none."""
        told = self._query("--query-gpu", _GPU_FIELDS)
        partitioned = {row[0]: (str(number), row[1]) for number, row in enumerate(told) if row[4] == "Enabled"}
        gpus = [
            row
            for number, row in enumerate(told)
            if row[0] not in partitioned and self._is_visible(str(number), row[0])
        ]
        processes: dict[str, dict[int, int]] = {}
        for id, pid, used_mib in self._query("--query-compute-apps", _PROCESS_FIELDS) if gpus else []:
            if pid.isdigit() and used_mib.isdigit():
                processes.setdefault(id, {})[int(pid)] = int(used_mib) * limits.MIB
        whole = [
            Device(
                id=id,
                name=name,
                total_bytes=int(total_mib) * limits.MIB,
                used_bytes=int(used_mib) * limits.MIB,
                processes=processes.get(id, {}),
            )
            for id, name, total_mib, used_mib, _ in gpus
            if total_mib.isdigit() and used_mib.isdigit()
        ]
        return (*whole, *(self._partitions(partitioned) if partitioned else ()))

    def _partitions(self, partitioned: Mapping[str, tuple[str, str]]) -> list[Device]:
        """The partitions of GPUs, which are given by UUID with number and name."""
        listed, devices = self._listed_partitions(), []
        for gpu in _parsed(self._text("-q", "-x")).iter("gpu"):
            whole, parts = gpu.findtext("uuid", ""), list(gpu.iter("mig_device"))
            shared = Counter(part.findtext("gpu_instance_id") for part in parts)
            for part in parts:
                number, instance = part.findtext("index", ""), part.findtext("gpu_instance_id")
                sizes = [_mib(part.findtext(f"fb_memory_usage/{name}")) for name in ("total", "used")]
                if whole not in partitioned or (whole, number) not in listed or shared[instance] > 1 or None in sizes:
                    continue
                profile, id = listed[whole, number]
                if self._is_visible(partitioned[whole][0], whole) or self._is_visible("", id):
                    devices.append(
                        Device(
                            id=id,
                            name=f"{partitioned[whole][1]} MIG {profile}",
                            total_bytes=sizes[0] or 0,
                            used_bytes=sizes[1] or 0,
                            processes=_processes(gpu, instance),
                            whole=whole,
                        )
                    )
        return devices

    def _listed_partitions(self) -> dict[tuple[str, str], tuple[str, str]]:
        """UUID of the GPU and number of the partition to the partition's profile and UUID."""
        listed: dict[tuple[str, str], tuple[str, str]] = {}
        whole = ""
        for line in self._text("-L").splitlines():
            if found := _LISTED_GPU.match(line):
                whole = found[1]
            elif found := _LISTED_PARTITION.match(line):
                listed[whole, found[2]] = found[1], found[3]
        return listed

    def _is_visible(self, number: str, id: str) -> bool:
        return self._visible is None or any(one == number or id.startswith(one) for one in self._visible)

    def _query(self, what: str, fields: tuple[str, ...]) -> list[list[str]]:
        told = self._text(f"{what}={','.join(fields)}", "--format=csv,noheader,nounits")
        rows = ([cell.strip() for cell in row] for row in csv.reader(told.splitlines()))
        return [row for row in rows if len(row) == len(fields)]

    def _text(self, *arguments: str) -> str:
        """What the program prints; empty, with a line in the log unless there is no such program, where it fails."""
        command: Sequence[str] = (self._program, *arguments)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limits.GPU_FACTS_TIMEOUT_S)
        except FileNotFoundError:
            return ""
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.warning("%s tells nothing of the GPUs: %s", self._program, error)
            return ""
        if done.returncode:
            _log.warning("%s ended with %d: %s", self._program, done.returncode, done.stdout.strip()[:200])
            return ""
        return done.stdout


def _parsed(text: str) -> ElementTree.Element:
    """The program's XML; an empty element, with a line in the log, if it is none."""
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        _log.warning("the partitions of GPUs are not known: %s", error)
        return ElementTree.Element("none")


def _processes(gpu: ElementTree.Element, instance: str | None) -> dict[int, int]:
    """Process id to bytes of those on one partition of a GPU."""
    found = {}
    for process in gpu.iter("process_info"):
        pid, used_bytes = process.findtext("pid", ""), _mib(process.findtext("used_memory"))
        if process.findtext("gpu_instance_id") == instance and pid.isdigit() and used_bytes is not None:
            found[int(pid)] = used_bytes
    return found


def _mib(text: str | None) -> int | None:
    """Bytes of a size such as `20096 MiB`; None for what is no such size."""
    number, _, unit = (text or "").partition(" ")
    return int(number) * limits.MIB if number.isdigit() and unit == "MiB" else None
