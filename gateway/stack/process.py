"""Processes that outlive the one that started them, known again by more than a number.

A process id is reused, on this machine and after a copy of the state to another. So a record also holds the boot id,
the start time in clock ticks and the command line; only a process that has all four is ours to signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import StackDown


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """What tells one process from every other."""

    pid: int
    boot_id: str
    started_ticks: int
    command: tuple[str, ...]


def start_process(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log_path: Path
) -> ProcessRecord:
    """Starts `command` in a session of its own, with exactly this environment, its output appended to `log_path`."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _rotate(log_path)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            umask=0o077,
        )
    return ProcessRecord(
        pid=process.pid,
        boot_id=_boot_id(),
        started_ticks=_started_ticks(process.pid, is_zombie_ok=True) or 0,
        command=tuple(command),
    )


def is_running(record: ProcessRecord) -> bool:
    """Whether exactly this process lives; one that ended and waits for its parent does not."""
    if record.boot_id != _boot_id() or _started_ticks(record.pid) != record.started_ticks:
        return False
    try:
        words = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return False
    return tuple(os.fsdecode(word) for word in words) == record.command


def stop_processes(records: Sequence[ProcessRecord], *, timeout_s: float = limits.STACK_STOP_TIMEOUT_S) -> None:
    """Ends these processes and what they left in their sessions: asked first, killed after `timeout_s` seconds.

    StackDown if one is still there after that, which only the kernel can cause.
    """
    _signal([record for record in records if is_running(record)], signal.SIGTERM)
    _wait_gone(records, timeout_s)
    _signal(records, signal.SIGKILL)
    if not _wait_gone(records, limits.STACK_KILL_TIMEOUT_S):
        left = ", ".join(str(record.pid) for record in records if is_running(record))
        raise StackDown(f"processes {left} do not end even after SIGKILL; they wait for the kernel, try again later")


def log_tail(path: Path) -> str:
    """The log's name and its last lines, for messages."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4 * limits.KIB))
        lines = file.read().decode("utf-8", "replace").splitlines()[-limits.STACK_LOG_TAIL_LINES :]
    return "\n".join([f"see {path}", *(f"  {line}" for line in lines)])


def _signal(records: Sequence[ProcessRecord], number: signal.Signals) -> None:
    """Signals whole sessions, also of a leader that died, as long as nobody else has its number."""
    for record in records:
        if record.boot_id == _boot_id() and _started_ticks(record.pid, is_zombie_ok=True) in (
            None,
            record.started_ticks,
        ):
            with suppress(ProcessLookupError):
                os.killpg(record.pid, number)


def _wait_gone(records: Sequence[ProcessRecord], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(is_running(record) for record in records):
        if time.monotonic() > deadline:
            return False
        time.sleep(limits.SERVER_POLL_S)
    return True


def _started_ticks(pid: int, *, is_zombie_ok: bool = False) -> int | None:
    """Clock ticks after boot at which the process started, None if there is none (or it only waits for its parent)."""
    try:
        # The name in parentheses may hold anything, so fields are counted from the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" and not is_zombie_ok else int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _rotate(log_path: Path) -> None:
    log_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if log_path.exists() and log_path.stat().st_size > limits.STACK_LOG_MAX_BYTES:
        log_path.replace(log_path.with_suffix(".log.1"))
