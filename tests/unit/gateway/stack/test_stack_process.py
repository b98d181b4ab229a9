"""Detached processes: known by more than their number, and ended with all that they left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.stack.process import ProcessRecord, is_running, log_tail, start_process, stop_processes
from smeltkit.limits import STACK_LOG_MAX_BYTES

SLEEP = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)"
)

Start = Callable[..., ProcessRecord]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts Python programs, waits for their first line, and ends them after the test."""
    started: list[ProcessRecord] = []

    def launch(program: str, **environment: str) -> ProcessRecord:
        command = [sys.executable, "-c", program]
        log_path = tmp_path / "logs" / "p.log"
        record = start_process(command, environment=environment, folder=tmp_path / "run", log_path=log_path)
        started.append(record)
        while not log_path.read_text().endswith("\n"):
            time.sleep(0.01)
        return record

    yield launch
    stop_processes(started, timeout_s=0)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_process_has_its_own_session_folder_and_environment(start: Start, tmp_path: Path) -> None:
    """Nothing of the starter's environment leaks, and its terminal cannot end it."""
    record = start("import os; print(os.getcwd(), os.getsid(0) == os.getpid(), dict(os.environ))\n" + SLEEP, A="1")
    line = (tmp_path / "logs" / "p.log").read_text().splitlines()[0]
    assert line.startswith(f"{tmp_path / 'run'} True {{'A': '1'")
    assert "PATH" not in line
    assert is_running(record)


def test_process_of_another_boot_start_or_command_is_not_ours(start: Start) -> None:
    """A reused number, or a state folder copied from another machine, never gets a signal."""
    record = start(SLEEP)
    for other in (
        replace(record, boot_id="another"),
        replace(record, started_ticks=record.started_ticks + 1),
        replace(record, command=("sleep", "1")),
    ):
        assert not is_running(other)
    stop_processes([replace(record, boot_id="another"), replace(record, started_ticks=record.started_ticks + 1)])
    assert is_running(record)


def test_process_that_ended_does_not_run_even_before_its_parent_asks(start: Start) -> None:
    """A zombie holds the number, and nothing else."""
    record = start(SLEEP)
    os.kill(record.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(record) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(record)


def test_stubborn_process_is_killed(start: Start) -> None:
    """Asked first, killed after the time given."""
    record = start(STUBBORN)
    stop_processes([record], timeout_s=0.2)
    assert not is_running(record)


@pytest.mark.parametrize("leader_dies_first", [False, True])
def test_children_end_with_their_session(start: Start, tmp_path: Path, leader_dies_first: bool) -> None:
    """Also those of a leader that was killed before."""
    record = start(PARENT)
    child = int((tmp_path / "logs" / "p.log").read_text())
    if leader_dies_first:
        os.kill(record.pid, signal.SIGKILL)
    stop_processes([record])
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_stopping_what_does_not_run_does_nothing(start: Start) -> None:
    """Twice is as good as once."""
    record = start(SLEEP)
    stop_processes([record])
    stop_processes([record])
    assert not is_running(record)


def test_long_log_is_put_aside_at_the_next_start(start: Start, tmp_path: Path) -> None:
    """One old log is kept, so logs are bounded."""
    log_path = tmp_path / "logs" / "p.log"
    log_path.parent.mkdir()
    log_path.write_bytes(b"x" * (STACK_LOG_MAX_BYTES + 1))
    start(SLEEP)
    assert log_path.read_text() == "ready\n"
    assert log_path.with_suffix(".log.1").stat().st_size == STACK_LOG_MAX_BYTES + 1


def test_log_tail_names_the_file_and_quotes_its_end(tmp_path: Path) -> None:
    """Eight lines are enough for a traceback's last words."""
    (tmp_path / "p.log").write_text("".join(f"line {number}\n" for number in range(1000)))
    lines = log_tail(tmp_path / "p.log").splitlines()
    assert lines[0] == f"see {tmp_path / 'p.log'}"
    assert lines[1:] == [f"  line {number}" for number in range(992, 1000)]
