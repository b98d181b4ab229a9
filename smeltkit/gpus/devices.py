"""The GPUs of this machine as facts: how much memory each has, how much is in use, and by which processes."""

from __future__ import annotations

import csv
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from smeltkit import limits

_log = logging.getLogger(__name__)
_GPU_FIELDS: Final = ("uuid", "name", "memory.total", "memory.used")
_PROCESS_FIELDS: Final = ("gpu_uuid", "pid", "used_memory")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as it is at this moment."""

    id: str
    """UUID that the driver gave it: it stays when devices are numbered anew."""
    name: str
    total_bytes: int
    used_bytes: int
    """In use by whomever."""
    processes: Mapping[int, int] = field(default_factory=dict)
    """Process id to the bytes it uses; empty where the driver does not tell, as in some containers."""


class Devices(Protocol):
    """Tells of the GPUs that this process may use. Blocking."""

    def read(self) -> tuple[Device, ...]:
        """All of them, in the driver's order; empty where there is none."""


class NvidiaSmi:
    """The GPUs that the driver's own program tells of. Partitions (MIG) have no memory of their own there: left out."""

    def __init__(self, program: str = "nvidia-smi", *, visible: str | None = None) -> None:
        """`visible`: numbers or UUIDs of those that may be used, as in CUDA_VISIBLE_DEVICES; None for all."""
        self._program = program
        self._visible = None if visible is None else [one.strip() for one in visible.split(",") if one.strip()]

    def read(self) -> tuple[Device, ...]:
        """The GPUs; empty, with a line in the log where it was there and failed, if the program tells none."""
        told = self._query("--query-gpu", _GPU_FIELDS)
        gpus = [row for number, row in enumerate(told) if self._is_visible(str(number), row[0])]
        processes: dict[str, dict[int, int]] = {}
        for id, pid, used_mib in self._query("--query-compute-apps", _PROCESS_FIELDS) if gpus else []:
            if pid.isdigit() and used_mib.isdigit():
                processes.setdefault(id, {})[int(pid)] = int(used_mib) * limits.MIB
        return tuple(
            Device(
                id=id,
                name=name,
                total_bytes=int(total_mib) * limits.MIB,
                used_bytes=int(used_mib) * limits.MIB,
                processes=processes.get(id, {}),
            )
            for id, name, total_mib, used_mib in gpus
            if total_mib.isdigit() and used_mib.isdigit()
        )

    def _is_visible(self, number: str, id: str) -> bool:
        return self._visible is None or any(one == number or id.startswith(one) for one in self._visible)

    def _query(self, what: str, fields: tuple[str, ...]) -> list[list[str]]:
        command = [self._program, f"{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limits.GPU_FACTS_TIMEOUT_S)
        except FileNotFoundError:
            return []
        except (OSError, subprocess.TimeoutExpired) as error:
            _log.warning("%s tells nothing of the GPUs: %s", self._program, error)
            return []
        if done.returncode:
            _log.warning("%s ended with %d: %s", self._program, done.returncode, done.stdout.strip()[:200])
            return []
        rows = ([cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()))
        return [row for row in rows if len(row) == len(fields)]
