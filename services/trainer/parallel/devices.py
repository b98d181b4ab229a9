"""How many processes can share a training on this machine: known without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from smeltkit.errors import BadConfig

_GPUS: Final = Path("/proc/driver/nvidia/gpus")
"""Where the driver shows the GPUs of this machine, or of this container."""


def devices_here() -> tuple[int, str]:
    """The number of GPUs, or of processors that this process may use where there is no GPU, and which it is."""
    gpus = len(list(_GPUS.glob("*")))
    return (gpus, "GPUs") if gpus else (len(os.sched_getaffinity(0)), "processors")


def refusals(processes: int, nodes: int = 1) -> list[BadConfig]:
    """Why so many processes cannot run here, or on as many machines like this one."""
    count, kind = devices_here()
    return [BadConfig(too_many(processes, count, kind, nodes))] if processes > nodes * count else []


def too_many(processes: int, count: int, kind: str, nodes: int = 1) -> str:
    """What is wrong with more processes than devices, of which each machine has `count`."""
    have = "this machine has" if nodes == 1 else f"{nodes} machines like this one have"
    return f"processes={processes} need a device each, but {have} {nodes * count} {kind}; lower it to {nodes * count}"
