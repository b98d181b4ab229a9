"""The processes of a lease: those whose last argument is its holder's name, in this machine's or container's view.

So they are found again by whoever looks, also when the process that started them died before it could write them down.
What it does not see: processes of other users, and those in containers that hide theirs from this one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PLANS: Final = "smelt-plan"
"""Last argument of processes that measure for a plan, on a device that is free: soon over, and in nobody's way."""
_PROCESSES: Final = Path("/proc")


def pids_of(holder: str) -> list[int]:
    """The processes that work under a lease."""
    mark = holder.encode()
    return [int(path.name) for path in _PROCESSES.glob("[0-9]*") if _last_argument(path) == mark]


def present(pids: Iterable[int]) -> list[int]:
    """Those of the processes that exist in this machine's or container's view."""
    return [pid for pid in pids if (_PROCESSES / str(pid)).exists()]


def end(pids: Iterable[int]) -> None:
    """Ends processes at once; those that are gone already are passed over."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _last_argument(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes().rstrip(b"\0").rpartition(b"\0")[2]
    except OSError:
        return b""
