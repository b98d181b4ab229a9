"""A control group per slot: memory, processes and CPU of a whole tree, version 1 or 2, whichever controls them here.

A slot's zygotes live in its group, so children are born there and nothing is moved per run. Their own memory is the
baseline that limits are set on top of and that peaks are reported without.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PREFIX: Final = "smelt-sandbox-"
SERVICE: Final = f"{PREFIX}service-"
_V1: Final = ("memory", "pids", "cpuacct")
_V2: Final = ("memory", "pids")
_MOVE_PASSES_MAX: Final = 10
_REMOVE_TRIES_MAX: Final = 100
_REMOVE_PAUSE_S: Final = 0.01
_NANOSECONDS: Final = 1e-9
_MICROSECONDS: Final = 1e-6


@dataclass(frozen=True)
class Hierarchy:
    """Where groups of ours can be made: version, and our own group's folder per controller."""

    version: int
    folders: Mapping[str, Path]


def find_hierarchy(proc: Path = Path("/proc/self")) -> Hierarchy:
    """The hierarchy whose memory, pids and CPU controllers we can use; OSError says what is missing. A process that
    `prepare` moved finds the folder that it came from."""
    own = dict(_own_groups((proc / "cgroup").read_text(encoding="utf-8")))
    mounts = dict(_mounts((proc / "mountinfo").read_text(encoding="utf-8")))
    if all(name in own and name in mounts for name in _V1):
        return Hierarchy(1, {name: mounts[name] / own[name].lstrip("/") for name in _V1})
    if "" in own and "" in mounts:
        folder = mounts[""] / own[""].lstrip("/")
        folder = folder.parent if folder.name.startswith(SERVICE) else folder
        present = (folder / "cgroup.controllers").read_text(encoding="utf-8").split()
        if set(_V2) <= set(present):
            return Hierarchy(2, {"": folder})
        raise OSError(95, f"controllers of {folder} are {' '.join(present) or 'none'}; memory and pids are needed")
    raise OSError(95, "no control group hierarchy is mounted")


def prepare(hierarchy: Hierarchy) -> None:
    """Before groups are made, any number of times: removes those of lives that ended; version 2: makes room for groups
    with controllers, for which the own group must hold no process, so all of them move into a group beside."""
    for folder in hierarchy.folders.values():
        for left in folder.glob(f"{PREFIX}*"):
            if not _is_owner_alive(left.name):
                with contextlib.suppress(OSError):
                    left.rmdir()
    if hierarchy.version == 2:
        folder = hierarchy.folders[""]
        _empty(folder)
        (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _V2), encoding="ascii")


def _empty(folder: Path) -> None:
    """Moves all processes of the group, and what they fork meanwhile, into one below it."""
    for _ in range(_MOVE_PASSES_MAX):
        pids = (folder / "cgroup.procs").read_text(encoding="ascii").split()
        if not pids:
            return
        service = folder / f"{SERVICE}{os.getpid()}"
        service.mkdir(exist_ok=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (service / "cgroup.procs").write_text(pid, encoding="ascii")


class Group:
    """The group of one slot. Files stay open: opening one by path costs more than the access."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self._version = hierarchy.version
        self._folders = {controller: folder / f"{PREFIX}{name}" for controller, folder in hierarchy.folders.items()}
        self._files: dict[str, int] = {}
        self._written: dict[str, int] = {}
        for folder in self._folders.values():
            folder.mkdir(exist_ok=True)

    def add(self, pid: int) -> None:
        """Moves the process; later children are born in the group."""
        for folder in self._folders.values():
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def set_limits(self, *, memory_bytes: int, pids: int) -> None:
        """Bounds the tree; swap counts as memory. Written only when changed."""
        if self._written.get("memory") != memory_bytes:
            self._written["memory"] = memory_bytes
            self._limit_memory(memory_bytes)
        if self._written.get("pids") != pids:
            self._written["pids"] = pids
            self._write("pids.max", pids)

    def usage_bytes(self) -> int:
        """Memory in use by the group."""
        return int(self._read("memory.usage_in_bytes" if self._version == 1 else "memory.current"))

    def processes(self) -> int:
        """Processes and threads in the group."""
        return int(self._read("pids.current"))

    def reset_peak(self) -> None:
        """Starts a new peak where the kernel can (version 1 always, version 2 from 6.12 on)."""
        with contextlib.suppress(OSError):
            self._write("memory.max_usage_in_bytes" if self._version == 1 else "memory.peak", 0)

    def peak_bytes(self) -> int:
        """Highest memory use since `reset_peak`."""
        with contextlib.suppress(OSError):
            return int(self._read("memory.max_usage_in_bytes" if self._version == 1 else "memory.peak"))
        return self.usage_bytes()

    def oom_kills(self) -> int:
        """Processes that the kernel ended for memory, ever."""
        return _keyed(self._read("memory.oom_control" if self._version == 1 else "memory.events"), "oom_kill")

    def cpu_s(self) -> float:
        """CPU seconds of the group, ever."""
        if self._version == 1:
            return int(self._read("cpuacct.usage")) * _NANOSECONDS
        return _keyed(self._read("cpu.stat"), "usage_usec") * _MICROSECONDS

    def close(self) -> None:
        """Removes the group once its last process is gone; what is left goes at the next start."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        for folder in self._folders.values():
            _remove(folder)

    def _limit_memory(self, memory_bytes: int) -> None:
        if self._version == 2:
            self._write("memory.max", memory_bytes)
            self._optional(lambda: self._write("memory.swap.max", 0))
            return
        self._optional(lambda: self._write("memory.memsw.limit_in_bytes", -1))
        self._write("memory.limit_in_bytes", memory_bytes)
        self._optional(lambda: self._write("memory.memsw.limit_in_bytes", memory_bytes))

    def _optional(self, write: Callable[[], None]) -> None:
        """Swap files exist only where swap is accounted."""
        with contextlib.suppress(FileNotFoundError):
            write()

    def _open(self, name: str) -> int:
        if name not in self._files:
            controller = "" if self._version == 2 else name.partition(".")[0]
            path = self._folders[controller] / name
            mode = os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY
            self._files[name] = os.open(path, mode | os.O_CLOEXEC)
        return self._files[name]

    def _read(self, name: str) -> str:
        return os.pread(self._open(name), 4096, 0).decode("ascii")

    def _write(self, name: str, value: int) -> None:
        os.pwrite(self._open(name), b"%d" % value, 0)


def _is_owner_alive(name: str) -> bool:
    """Whether the service that made the group lives: its pid is in the name."""
    words = name.removeprefix(PREFIX).split("-")
    pid = words[0] if words[0].isdigit() else words[-1]
    return os.path.exists(f"/proc/{pid}")


def _remove(folder: Path) -> None:
    """A killed process leaves its group a moment later."""
    for _ in range(_REMOVE_TRIES_MAX):
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(_REMOVE_PAUSE_S)


def _keyed(text: str, key: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [key]), 0)


def _own_groups(text: str) -> list[tuple[str, str]]:
    rows = [line.split(":", 2) for line in text.splitlines()]
    return [(controller, row[2]) for row in rows for controller in row[1].split(",")]


def _mounts(text: str) -> list[tuple[str, Path]]:
    """Controller to mount point; the empty name is version 2."""
    found = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        kind, _, options = tail.split(" ")[0], None, tail.split(" ")[-1]
        place = Path(head.split(" ")[4])
        if kind == "cgroup2":
            found.append(("", place))
        elif kind == "cgroup":
            found += [(controller, place) for controller in options.split(",")]
    return found
