"""Word of processes that crashed: how each ended, by which signal, in which device state and at which step (R-123).

A process keeps a page `<folder>/<service>-<pid>.run` mapped and writes into it the step it is at, which costs a copy
of some bytes; the kernel keeps the page whatever ends the process. A process that ends well removes its page. The next
process that starts turns every page whose owner is gone into a report `<service>-<pid>.json`, and logs it:

    error    an exception ended it; `detail` is its reason
    signal   a fault of its own code: SIGSEGV, SIGABRT, SIGBUS, SIGFPE or SIGILL, told by faulthandler's trace
    killed   it left no word, and only SIGKILL allows none: the out-of-memory killer, or somebody's hand
    machine  the machine itself was started again since
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor

from smeltkit import limits
from smeltkit.errors import SmeltError

_LOG = logging.getLogger(__name__)
_FATAL = re.compile(r"Fatal Python error: (.+)|fatal exception: (.+)")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Floating point exception": "SIGFPE",
    "Floating-point exception": "SIGFPE",
    "Illegal instruction": "SIGILL",
}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, kw_only=True)
class Crash:
    """How one process ended."""

    service: str
    exit_class: str
    """error, signal, killed or machine."""
    signal: str
    """Name of the signal; empty where none ended it."""
    device_state: str
    """Devices present when the crash was found; "none" without a GPU."""
    last_step: str
    """Name of the span that was begun last; empty before the first."""
    detail: str
    """Reason of the exception, or the innermost frames at a fault."""
    found_s: float
    """When it was found, in Unix time."""


class CrashRecorder(SpanProcessor):
    """The page of this process; every span that begins is a step. Made once a process, before the first span."""

    def __init__(self, folder: Path, service: str) -> None:
        """Reports what earlier processes left in `folder`, then begins this one's page."""
        folder.mkdir(parents=True, exist_ok=True)
        for crash in collect(folder):
            _LOG.info("a process crashed", extra={"crash": json.dumps(asdict(crash))})
        self._service = service
        self._path = folder / f"{service}-{os.getpid()}.run"
        self._file: BinaryIO = self._path.open("wb+")
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        self._file.truncate(limits.CRASH_PAGE_BYTES)
        self._page = mmap.mmap(self._file.fileno(), limits.CRASH_PAGE_BYTES)
        self._fault = self._path.with_suffix(".fault").open("wb+")
        faulthandler.enable(self._fault)
        self._write("")

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Takes a span that begins as the step."""
        self._write(span.name)

    def shutdown(self) -> None:
        """Ends the page: removed after a good end, made a report where an exception is on its way."""
        if self._file.closed:
            return
        faulthandler.disable()
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            reason = error.reason() if isinstance(error, SmeltError) else type(error).__name__
            _save(self._path, _crash(_parse(self._path), exit_class="error", detail=reason))
        self._page.close()
        self._fault.close()
        self._file.close()
        _remove(self._path)

    def _write(self, step: str) -> None:
        value = {"service": self._service, "boot": _boot_id(), "step": step[: limits.CRASH_STEP_MAX_CHARS]}
        text = json.dumps(value).encode()
        self._page[:] = text.ljust(limits.CRASH_PAGE_BYTES)


def collect(folder: Path) -> list[Crash]:
    """Crashes of processes whose page nobody holds any more, each found once; its report stays in `folder`."""
    found = []
    for path in sorted(folder.glob("*.run")):
        for page in _abandoned(path):
            crash = _judge(path, page)
            _save(path, crash)
            _remove(path)
            found.append(crash)
    _remove_oldest(folder)
    return found


def reports(folder: Path) -> list[Crash]:
    """The reports in `folder`, oldest first."""
    found = (Crash(**json.loads(path.read_bytes())) for path in folder.glob("*.json"))
    return sorted(found, key=lambda crash: crash.found_s)


def _abandoned(path: Path) -> Iterator[dict[str, Any]]:
    """The page at `path` if its process is gone; nothing if it lives, or if somebody else was faster."""
    try:
        with path.open("rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():
                yield _parse(path)
    except OSError:
        return


def _judge(path: Path, page: dict[str, Any]) -> Crash:
    trace = path.with_suffix(".fault")
    text = trace.read_text(errors="replace") if trace.is_file() else ""
    if match := _FATAL.search(text):
        name = (match[1] or match[2]).strip()
        frames = [line.strip() for line in text.splitlines() if line.startswith("  File")][: limits.CRASH_FRAMES_MAX]
        detail = "; ".join(re.sub(r'"[^"]*/', '"', frame) for frame in frames)
        return _crash(page, exit_class="signal", signal=_SIGNALS.get(name, name), detail=detail)
    if page.get("boot") != _boot_id():
        return _crash(page, exit_class="machine")
    return _crash(page, exit_class="killed", signal="SIGKILL")


def _crash(page: dict[str, Any], *, exit_class: str, signal: str = "", detail: str = "") -> Crash:
    return Crash(
        service=page.get("service", ""),
        exit_class=exit_class,
        signal=signal,
        device_state=_device_state(),
        last_step=page.get("step", ""),
        detail=detail,
        found_s=round(time.time(), 3),
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        return {"service": path.stem.rpartition("-")[0]}
    return value


def _save(path: Path, crash: Crash) -> None:
    path.with_suffix(".json").write_text(json.dumps(asdict(crash)) + "\n")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".fault").unlink(missing_ok=True)


def _remove_oldest(folder: Path) -> None:
    by_age = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[limits.CRASHES_MAX :]:
        path.unlink(missing_ok=True)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


def _device_state() -> str:
    """The GPUs that the driver still knows; a device that fell off its bus is missing from it."""
    found = sorted(path.name for path in _GPUS.iterdir()) if _GPUS.is_dir() else []
    return f"present: {', '.join(found)}" if found else "none"
