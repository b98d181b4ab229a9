"""What the platform needs of this machine, looked at without starting anything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gateway.cli.output import human_bytes
from gateway.stack import status
from smeltkit import limits
from smeltkit.crashes import collect, reports
from smeltkit.errors import SmeltError
from smeltkit.servers import find_executable

_MEMORY_MIN_BYTES = 2 * limits.GIB
_DISK_MIN_BYTES = 2 * limits.GIB
_CRASHES_RECENT_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at; `detail` is the remedy where it is not ok."""

    subject: str
    is_ok: bool
    detail: str


def examine(home: Path) -> list[Finding]:
    """Findings in the order in which they matter."""
    servers = [_server(name) for name in ("nats-server", "weed")]
    return [_python(), *servers, _engine(), _memory(), _disk(home), _stack(home), _crashes(home)]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(subject="Python 3.11 or newer", is_ok=sys.version_info >= (3, 11), detail=version)


def _server(name: str) -> Finding:
    try:
        return Finding(subject=name, is_ok=True, detail=str(find_executable(name)))
    except SmeltError as error:
        return Finding(subject=name, is_ok=False, detail=error.message)


def _engine() -> Finding:
    """Looks for llama.cpp without loading it."""
    found = importlib.util.find_spec("llama_cpp") is not None
    return Finding(subject="llama.cpp engine", is_ok=found, detail="installed" if found else "run `make install`")


def _memory() -> Finding:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(subject="memory, 2 GiB", is_ok=total_bytes >= _MEMORY_MIN_BYTES, detail=human_bytes(total_bytes))


def _disk(home: Path) -> Finding:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free_bytes = shutil.disk_usage(folder).free
    return Finding(
        subject="disk, 2 GiB free", is_ok=free_bytes >= _DISK_MIN_BYTES, detail=f"{human_bytes(free_bytes)} at {folder}"
    )


def _stack(home: Path) -> Finding:
    found = status(home)
    if not any(item.health != "stopped" for item in found.components):
        return Finding(subject="platform", is_ok=True, detail="not started; `smelt up` or any command starts it")
    broken = [f"{item.name} {item.health}" for item in found.components if item.health != "healthy"]
    detail = f"{', '.join(broken)}; `smelt up` heals it" if broken else "every process is healthy"
    return Finding(subject="platform", is_ok=not broken, detail=detail)


def _crashes(home: Path) -> Finding:
    """Processes of this platform that crashed within a day."""
    folder = home / "traces" / "crashes"
    collect(folder)
    crashes = [crash for crash in reports(folder) if time.time() - crash.found_s < _CRASHES_RECENT_S]
    detail = "; ".join(
        f"{crash.service} {crash.exit_class} {crash.signal} in {crash.last_step or 'its start'}"
        for crash in crashes[-3:]
    )
    subject = "crashes within a day"
    return Finding(subject=subject, is_ok=not crashes, detail=f"{detail}; {folder}" if crashes else "none")
