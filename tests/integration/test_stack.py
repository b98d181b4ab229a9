"""The local stack with all its real processes: up, killed in every part, healed, and down without a trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gateway import stack
from gateway.stack.components import platform_config
from gateway.stack.process import ProcessRecord, is_running
from gateway.stack.state import SERVERS, SERVICES, StackState, load_credentials
from smeltkit import limits
from smeltkit.blobs.s3 import S3Store
from smeltkit.errors import BadCertificate, BadConfig, DiskFull, PortTaken, StackDown
from smeltkit.servers import is_port_free

NAMES = (*SERVERS, *SERVICES, "gateway")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running stack that the tests of this module hurt and heal."""
    folder = tmp_path_factory.mktemp("stack") / "home"
    try:
        stack.start(folder)
        yield folder
    finally:
        stack.stop(folder)


def pids(home: Path) -> dict[str, int]:
    """Process ids by name."""
    return {item.name: item.pid for item in stack.status(home).components}


def kill(home: Path, name: str, number: signal.Signals = signal.SIGKILL) -> ProcessRecord:
    """Signals one process; returns once a killed one and its port are gone."""
    record = loaded(home).processes[name]
    assert is_running(record)
    os.kill(record.pid, number)
    deadline = time.monotonic() + 10
    while number == signal.SIGKILL and time.monotonic() < deadline:
        if not is_running(record) and is_port_free(loaded(home).ports[name]):
            break
        time.sleep(0.01)
    return record


def loaded(home: Path) -> StackState:
    """What the stack remembers."""
    state = StackState.load(home)
    assert state is not None
    return state


def processes_below(home: Path) -> list[str]:
    """Command lines of all processes whose working directory is below `home`; one that is ending has none any more."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(home):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue
    return [command for command in found if command]


def test_everything_is_healthy_at_the_addresses_of_the_state_file(home: Path) -> None:
    """The file is what other tools read."""
    status = stack.status(home)
    assert status.is_up
    assert [item.name for item in status.components] == list(NAMES)
    value = json.loads((home / "stack.json").read_text())
    assert value["gateway_grpc"] == status.gateway_grpc
    assert value["gateway_http"] == status.gateway_http
    assert set(value["services"]) == set(SERVICES)
    for item in status.components:
        host, _, port = item.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5):
            pass


def test_starting_again_changes_nothing(home: Path) -> None:
    """`smelt up` twice is fine."""
    before, done = pids(home), []
    assert stack.start(home, report=done.append).is_up
    assert (pids(home), done) == (before, [])


@pytest.mark.parametrize("name", NAMES)
def test_killed_process_is_started_again_alone(home: Path, name: str) -> None:
    """kill -9 of any one: it is seen as stopped, and the next start replaces it and nothing else."""
    before = pids(home)
    kill(home, name)
    assert {item.name for item in stack.status(home).components if item.health == "stopped"} == {name}
    assert stack.start(home).is_up
    after = pids(home)
    assert after.pop(name) != before.pop(name)
    assert after == before


def test_process_that_does_not_answer_is_replaced(home: Path) -> None:
    """A stopped process holds its port and answers nothing."""
    before = pids(home)
    kill(home, "trainer", signal.SIGSTOP)
    assert {item.name: item.health for item in stack.status(home).components}["trainer"] == "unhealthy"
    told: list[str] = []
    assert stack.start(home, report=told.append).is_up
    assert pids(home)["trainer"] != before["trainer"]
    assert told[0] == f"replacing trainer: no answer within {limits.STACK_PATIENCE_S:.0f} s"


def test_process_that_answers_late_is_left_alone(home: Path) -> None:
    """As on a loaded machine: it is stopped for a while only."""
    before = pids(home)
    kill(home, "trainer", signal.SIGSTOP)
    timer = threading.Timer(limits.STACK_CHECK_TIMEOUT_S + 1, kill, (home, "trainer", signal.SIGCONT))
    timer.start()
    assert stack.start(home).is_up
    timer.join()
    assert pids(home) == before


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What was seen when the stack was stopped, and then started by two at once from a state of another boot."""

    before: StackState
    digest: str
    """Of what was stored before."""
    left: list[str]
    """What was still there when it was stopped."""
    health: set[str]
    """What the state of the other boot was taken for."""
    outputs: list[str]
    """Of the two starters."""
    codes: list[int]
    stranger: int | None
    """How a process ended whose number stood in that state; None if it did not."""


@pytest.fixture(scope="module")
def restart(home: Path) -> Restart:
    """One stop and one start of everything for all tests about these: they take long."""
    before = loaded(home)
    store = S3Store(platform_config(before, load_credentials(home)))
    digest = store.put_bytes(b"outlives a restart")
    stack.stop(home)
    sockets = [path for path in Path("/tmp").glob("seaweedfs-*") if str(before.ports["s3"] + 10_000) in path.name]
    left = [name for name, record in before.processes.items() if is_running(record)]
    left += [*processes_below(home), *map(str, sockets)]
    left += [item.name for item in stack.status(home).components if item.health != "stopped"]
    stack.stop(home)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        state = loaded(home)
        state.processes = {
            name: replace(record, pid=stranger.pid, boot_id="before the reboot")
            for name, record in before.processes.items()
        }
        state.save(home)
        health: set[str] = {item.health for item in stack.status(home).components}
        program = "import sys, pathlib; from gateway import stack; stack.start(pathlib.Path(sys.argv[1]), report=print)"
        command = [sys.executable, "-c", program, str(home)]
        starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [starter.communicate()[0] for starter in starters]
        code = stranger.poll()
        stranger.kill()
    return Restart(
        before=before, digest=digest, left=left, health=health, outputs=outputs,
        codes=[starter.returncode for starter in starters], stranger=code,
    )  # fmt: skip


def test_two_starters_do_not_start_anything_twice(home: Path, restart: Restart) -> None:
    """The second waits for the first and finds the work done."""
    assert restart.codes == [0, 0]
    assert sum(output.count("started ") for output in restart.outputs) == len(NAMES), restart.outputs
    assert len([line for line in processes_below(home) if "services.importer" in line]) == 1


def test_stop_leaves_no_process_and_start_keeps_addresses_and_data(home: Path, restart: Restart) -> None:
    """Down and up again is the same platform."""
    assert restart.left == []
    assert stack.status(home).is_up
    assert loaded(home).ports == restart.before.ports
    store = S3Store(platform_config(loaded(home), load_credentials(home)))
    assert store.get_bytes(restart.digest) == b"outlives a restart"


def test_state_of_another_boot_is_not_believed(restart: Restart) -> None:
    """Numbers in a file of before a reboot belong to strangers now: nothing is signalled, everything is started."""
    assert restart.health == {"stopped"}
    assert restart.stranger is None


def test_port_taken_by_somebody_else_is_named(home: Path) -> None:
    """With the port, the component and what to do; what ran goes on, and nothing is started beside it."""
    kill(home, "trainer")
    kill(home, "nats")
    port = loaded(home).ports["trainer"]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(PortTaken, match=f"port {port} of trainer is taken"):
            stack.start(home)
        assert pids(home)["nats"] == 0
    assert stack.start(home).is_up


def test_process_that_ends_while_it_starts_is_named_with_its_log(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of the log stand in the message: what is wrong with a file that was there before, no traceback."""
    kill(home, "trainer")
    monkeypatch.setattr("gateway.stack.stack.check_settings", lambda component: None)
    monkeypatch.setenv("SMELT_RPC_TOKEN_FILE", "missing")
    with pytest.raises(StackDown, match=r"(?s)trainer ended while it was starting; see .*trainer\.log") as caught:
        stack.start(home)
    last = caught.value.message.splitlines()[-1]
    assert "missing cannot be read" in last and '"reason": "BAD_CONFIG"' in last
    monkeypatch.delenv("SMELT_RPC_TOKEN_FILE")
    assert stack.start(home).is_up


def test_settings_of_a_running_process_that_differ_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone, and whoever changed them hears how they come to be used."""
    before, told = pids(home), []
    monkeypatch.setenv("SMELT_INFERENCE_SLOTS", "4")
    assert stack.start(home, report=told.append).is_up
    assert pids(home) == before
    assert told == [
        "inference runs with other settings than now (SMELT_INFERENCE_SLOTS); `smelt down`, then `smelt up`, takes "
        "the new ones"
    ]


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("SMELT_TRAINER_SLOT", "SMELT_TRAINER_SLOT is set but nothing reads it; did you mean SMELT_TRAINER_SLOTS"),
        ("SMELT_INFERENCE_BATCH_ROWS", r"SMELT_INFERENCE_\*: batch_rows=1 is out of range; allowed: 16 to 8192"),
        ("SMELT_SANDBOX_LEVEL", "SMELT_SANDBOX_.*: .*confined, rootless"),
        ("SMELT_HTTP_KEEPALIVE", "did you mean SMELT_HTTP_KEEPALIVE_S"),
        ("SMELT_RPC_DRAIN_GRACE_S", "SMELT_RPC_DRAIN_GRACE_S='-'"),
        ("SMELT_HTTP_API_KEYS_FILE", "api_keys_file .*/1 cannot be read"),
        ("SMELT_RPC_TLS_DIR", "tls.crt: No such file"),
    ],
)
def test_settings_that_a_process_would_refuse_are_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, says: str
) -> None:
    """R-006: of every service, whatever is wrong with it; no process is left behind."""
    monkeypatch.setenv(variable, "-" if variable.endswith("GRACE_S") else "1")
    with pytest.raises(BadCertificate if variable.endswith("TLS_DIR") else BadConfig, match=says):
        stack.start(tmp_path / "home")
    assert processes_below(tmp_path) == [] and not (tmp_path / "home" / "stack.json").exists()


def test_sandbox_process_holds_no_secret(home: Path) -> None:
    """Read from the running process itself."""
    environment = Path(f"/proc/{pids(home)['sandbox']}/environ").read_bytes()
    for credentials in load_credentials(home).values():
        assert credentials.secret.encode() not in environment
    assert b"SMELT_PLATFORM_" not in environment


def test_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With the variable that moves it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="SMELT_HOME"):
        stack.start(tmp_path / "file" / "home")


def test_full_disk_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is free, what is needed, and the way out."""
    monkeypatch.setattr("smeltkit.limits.STACK_DISK_MIN_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match="set SMELT_HOME to a folder on another disk"):
        stack.start(tmp_path / "home")
    assert not (tmp_path / "home" / "stack.json").exists()


def test_folder_without_a_stack_is_down(tmp_path: Path) -> None:
    """Asking and stopping create nothing."""
    assert not stack.status(tmp_path / "home").is_up
    stack.stop(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []
