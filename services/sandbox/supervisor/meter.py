"""CPU and memory of a candidate's whole tree: from the slot's control group, else summed over its processes.

Peak memory is never `ru_maxrss`: after a fork that starts at the parent's, and it is the largest process, not the sum.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.sandbox.kernel.cgroups import Group

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_PROCESS_CLOCK: Final = 2
_PROCESSES_MAX: Final = 1024


def process_cpu_s(pid: int) -> float:
    """CPU seconds of one living process without its children; 0 when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | _PROCESS_CLOCK)
    except OSError:
        return 0.0


def waited_s(pid: int) -> float:
    """Seconds that the process was runnable but waited for a core; 0 where the kernel does not say."""
    try:
        descriptor = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0.0
    try:
        return int(os.read(descriptor, 128).split()[1]) * 1e-9
    except (OSError, IndexError):
        return 0.0
    finally:
        os.close(descriptor)


class GroupMeter:
    """Reads the control group of the slot; what the zygotes use themselves is taken off, and comes on top of bounds."""

    is_exact = True

    def __init__(self, group: Group) -> None:
        self._group = group
        self._baseline_bytes = 0
        self._start_s = 0.0
        self._start_kills = 0

    def start(self, pid: int, zygote_pid: int, memory_bytes: int, pids: int) -> None:
        """Begins a run with these bounds for the tree."""
        self._baseline_bytes = self._group.usage_bytes()
        others = self._group.processes() - 1
        self._group.set_limits(memory_bytes=_rounded(self._baseline_bytes) + memory_bytes, pids=others + pids)
        self._group.reset_peak()
        self._start_s = self._group.cpu_s()
        self._start_kills = self._group.oom_kills()

    def cpu_s(self) -> float:
        """CPU seconds of the tree since `start`."""
        return self._group.cpu_s() - self._start_s

    def sample_bytes(self) -> int:
        """The kernel watches the bound itself."""
        return 0

    def peak_bytes(self) -> int:
        """Highest memory use of the run."""
        return max(0, self._group.peak_bytes() - self._baseline_bytes)

    def was_oom_killed(self) -> bool:
        """Whether the kernel ended a process of the run for memory."""
        return self._group.oom_kills() > self._start_kills


class TreeMeter:
    """Sums over the living processes of the tree; a process's pages shared with its zygote are taken off."""

    is_exact = False

    def __init__(self) -> None:
        self._inherited_bytes = 0
        self._pid = 0
        self._peak_bytes = 0

    def start(self, pid: int, zygote_pid: int, memory_bytes: int, pids: int) -> None:
        """Begins a run of the tree below `pid`, forked by `zygote_pid`; the bounds are the caller's to watch."""
        self._pid, self._peak_bytes = pid, 0
        self._inherited_bytes = _private_bytes(zygote_pid)

    def cpu_s(self) -> float:
        """CPU seconds of the tree's living and reaped processes."""
        return sum(_cpu_with_children_s(pid) for pid in _tree(self._pid))

    def sample_bytes(self) -> int:
        """Memory of the tree now."""
        found = sum(max(0, _private_bytes(pid) - self._inherited_bytes) for pid in _tree(self._pid))
        self._peak_bytes = max(self._peak_bytes, found)
        return found

    def peak_bytes(self) -> int:
        """The highest sample."""
        return self._peak_bytes

    def was_oom_killed(self) -> bool:
        """Never known without a control group."""
        return False


Meter = GroupMeter | TreeMeter
_STEP_BYTES: Final = 4 * 1024 * 1024


def _rounded(size_bytes: int) -> int:
    """Up to a step, so that a baseline that wobbles does not rewrite the limit each run."""
    return -(-size_bytes // _STEP_BYTES) * _STEP_BYTES


def _tree(pid: int) -> Iterator[int]:
    waiting, seen = [pid], 0
    while waiting and seen < _PROCESSES_MAX:
        current = waiting.pop()
        seen += 1
        yield current
        try:
            for task in os.listdir(f"/proc/{current}/task"):
                children = Path(f"/proc/{current}/task/{task}/children").read_text(encoding="ascii")
                waiting += map(int, children.split())
        except OSError:
            continue


def _cpu_with_children_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) * _TICK_S


def _private_bytes(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES
