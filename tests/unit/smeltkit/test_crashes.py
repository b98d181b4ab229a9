"""However a process ends, the next one finds word of it: each test ends a real process in one way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smeltkit.crashes import Crash, collect, reports

PROGRAM = """
import os, signal, sys
from smeltkit import telemetry
from smeltkit.errors import OutOfMemory
shutdown = telemetry.setup("trainer")
try:
    with telemetry.span("smelt.test.first"):
        pass
    with telemetry.span("smelt.test.step"):
        {end}
finally:
    shutdown()
"""
Ends = Callable[[str], list[Crash]]


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    """The crashes found after a process ended by a line of Python."""

    def run(end: str) -> list[Crash]:
        environ = {**os.environ, "SMELT_TELEMETRY_TRACE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], env=environ, capture_output=True, check=False)
        return collect(tmp_path / "crashes")

    return run


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE"])
def test_a_fault_of_native_code_is_told_by_its_signal(ends: Ends, name: str) -> None:
    """R-123: what llama.cpp does where its own checks fail."""
    (crash,) = ends(f"os.kill(os.getpid(), signal.{name})")
    assert (crash.service, crash.exit_class, crash.signal) == ("trainer", "signal", name)
    assert crash.last_step == "smelt.test.step"
    assert crash.detail.startswith('File "<string>"')
    assert crash.device_state


def test_a_killed_process_leaves_word_of_its_last_step(ends: Ends) -> None:
    """R-123: the out-of-memory killer gives no process a chance to speak."""
    (crash,) = ends("os.kill(os.getpid(), signal.SIGKILL)")
    assert (crash.exit_class, crash.signal, crash.last_step) == ("killed", "SIGKILL", "smelt.test.step")


def test_an_exception_that_nobody_catches_is_told_by_its_reason(ends: Ends, tmp_path: Path) -> None:
    """R-123: with the reason and never the message, which may quote a prompt."""
    assert ends("raise OutOfMemory('secret')") == []
    (report,) = (tmp_path / "crashes").glob("trainer-*.json")
    crash = Crash(**json.loads(report.read_text()))
    assert (crash.exit_class, crash.detail, crash.last_step) == ("error", "OUT_OF_MEMORY", "smelt.test.step")


@pytest.mark.parametrize("end", ["pass", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_process_that_ends_as_it_should_leaves_nothing(ends: Ends, tmp_path: Path, end: str) -> None:
    """R-123: an exit status is a decision, and Ctrl-C somebody's."""
    assert ends(end) == []
    assert list((tmp_path / "crashes").iterdir()) == []


def test_a_crash_is_found_once_and_its_report_stays(ends: Ends, tmp_path: Path) -> None:
    """R-123."""
    (crash,) = ends("os.kill(os.getpid(), signal.SIGKILL)")
    assert collect(tmp_path / "crashes") == []
    (report,) = (tmp_path / "crashes").iterdir()
    assert Crash(**json.loads(report.read_text())) == crash


def test_a_process_that_lives_is_no_crash(tmp_path: Path) -> None:
    """R-123: its page is locked, whatever its process id meant before."""
    environ = {**os.environ, "SMELT_TELEMETRY_TRACE_DIR": str(tmp_path)}
    program = PROGRAM.format(end="print('up', flush=True); sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert collect(tmp_path / "crashes") == []
        process.stdin.close()
    assert process.returncode == 0


def test_a_machine_that_was_started_again_is_told_from_a_kill(ends: Ends, tmp_path: Path) -> None:
    """R-123."""
    folder = tmp_path / "crashes"
    folder.mkdir()
    (folder / "sandbox-1.run").write_text(json.dumps({"service": "sandbox", "boot": "before", "step": "s"}))
    (folder / "gateway-2.run").write_bytes(b"")
    found = {crash.service: crash.exit_class for crash in collect(folder)}
    assert found == {"sandbox": "machine", "gateway": "machine"}


def test_reports_are_read_again_oldest_first(ends: Ends, tmp_path: Path) -> None:
    found = [*ends("os.kill(os.getpid(), signal.SIGKILL)"), *ends("os.kill(os.getpid(), signal.SIGSEGV)")]
    assert reports(tmp_path / "crashes") == found and len(found) == 2
