"""The most memory that a training held: on a GPU what torch allocated, else what the process grew by."""

from __future__ import annotations

import importlib
import os
import re
from contextlib import suppress
from pathlib import Path

import torch


class PeakMemory:
    """Counts from its making on: what a process holds after its imports is no cost of a training."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        if not self._is_cuda:
            importlib.import_module("torch._dynamo")  # 100 MiB that torch's first optimizer loads
            _forget_peak()
        self._before = 0 if self._is_cuda else _status_bytes("VmRSS")

    @property
    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated()
        return max(_status_bytes("VmHWM") - self._before, 0)


def memory_bytes(device: str, allowed_bytes: int = 0) -> int:
    """What a training may take at most: `allowed_bytes`, unless 0, else the GPU's memory or the machine's."""
    if allowed_bytes:
        return allowed_bytes
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _forget_peak() -> None:
    """Lets Linux count this process's peak anew; a kernel that cannot goes on with that of its whole life."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(key: str) -> int:
    """A size of this process as Linux tells it."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status tells no {key}"
    return int(found[1]) * 1024
