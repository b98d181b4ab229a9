"""Runs the corpus of hostile candidates on one slot and prints, a line a case, what came of it.

A process of its own, so that it can run as an ordinary user too: `python corpus_run.py jail|rootless|confined`. Started
by root for a weaker level, it first becomes a user without any right, with interpreter and repository made visible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from services.sandbox import doctor  # noqa: E402
from services.sandbox.config import SandboxConfig  # noqa: E402
from services.sandbox.job import Job  # noqa: E402
from services.sandbox.kernel import libc  # noqa: E402
from services.sandbox.kernel.numbers import numbers  # noqa: E402
from services.sandbox.layout import slot_specs  # noqa: E402
from services.sandbox.policy import Level, Limits  # noqa: E402
from services.sandbox.supervisor.slot import SELF_TEST, Slot  # noqa: E402
from services.sandbox.verdict import Verdict  # noqa: E402

CORPUS = Path(__file__).with_name("corpus")
ORDINARY_ID = 64999
TESTS = "assert solve(2) == 5\nassert [solve(n) for n in range(3)] == [1, 3, 5]\nassert solve(-4) == -7\n"
INSIDE_TESTS = """
import unittest
class Solved(unittest.TestCase):
    def test_one(self):
        self.assertEqual(solve(2), 5)
    def test_many(self):
        for n in (0, 1, -4):
            self.assertEqual(solve(n), 2 * n + 1)
"""
LIMITS = {"cpu_s": 2.0, "wall_s": 20.0, "memory_bytes": 128 << 20}
MEMORY_SLACK_BYTES = 16 << 20
_ATTEMPT = """
def attempt():
{body}
def solve(n):
    try:
        attempt()
    except Exception:
        return None
    return 2 * n + 1
"""
_CALLS = """
import ctypes
def attempt():
    libc = ctypes.CDLL(None, use_errno=True)
    for number, *arguments in {calls}:
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
        if result != -1 or ({wants_eperm} and ctypes.get_errno() != 1):
            return
    raise OSError
def solve(n):
    try:
        attempt()
    except OSError:
        return None
    return 2 * n + 1
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One hostile candidate and what may be said of it at each level."""

    name: str
    file: str
    code: str
    tests: str
    mode: str
    limits: Limits
    expected: tuple[str, ...]
    expected_confined: tuple[str, ...]

    def to_job(self) -> Job:
        """The case as a supervisor gets it."""
        return Job(
            code=self.code.encode(),
            form="unittest" if self.mode == "inside" else "asserts",
            mode=self.mode,
            tests=self.tests,
            exports=("solve",),
            limits=self.limits,
            seed=self.name,
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The verdict on one case, and what it left behind."""

    name: str
    verdict: str
    detail: str
    left_behind: list[str]


@dataclasses.dataclass(frozen=True)
class Canary:
    """Things of the host that a candidate must not reach."""

    folder: str
    port: int
    abstract: str


def load_cases(canary: Canary | None = None) -> list[Case]:
    """Every case of the corpus; names are unique."""
    paths = sorted(CORPUS.glob("*.toml"))
    rows = [{"file": path.stem, **row} for path in paths for row in tomllib.loads(path.read_text())["case"]]
    return [_case(row, canary or Canary("/nowhere", 1, "none")) for row in rows]


def run_all(level: Level, canary: Canary) -> Iterator[Outcome]:
    """Runs every case on one slot at `level`, with a look at what is left after each."""
    with open_slot(level) as (slot, cancel):
        usual = _present(slot)
        for case in load_cases(canary):
            record = slot.run(case.to_job(), cancel)
            healthy = slot.run(SELF_TEST, cancel).verdict is Verdict.PASSED
            slot.prepare_next()
            left = _left_behind(usual, _present(slot)) + ([] if healthy else ["a slot that does not judge"])
            yield Outcome(case.name, str(record.verdict), record.detail, left)


@contextlib.contextmanager
def open_slot(level: Level) -> Iterator[tuple[Slot, int]]:
    """One slot at `level` that has judged, and a descriptor that cancels nothing."""
    config = SandboxConfig(level=str(level), ceiling=str(level), slots=1)
    isolation = doctor.probe(config.uid_base, level)
    spec = slot_specs(config, isolation, doctor.require(isolation, level))[0]
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[level % len(os.sched_getaffinity(0))]})
    slot = Slot(spec)
    cancel, keep_open = os.pipe()
    try:
        slot.run(SELF_TEST, cancel)
        slot.prepare_next()
        yield slot, cancel
    finally:
        slot.close()
        os.close(keep_open)


def main() -> None:
    """Writes outcomes as JSON lines."""
    level = Level.named(sys.argv[1])
    if os.geteuid() == 0 and level < Level.JAIL:
        become_ordinary_user()
    with _canary() as canary:
        for outcome in run_all(level, canary):
            sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            sys.stdout.flush()


def become_ordinary_user() -> None:
    """Drops to a user without rights; what root alone could reach of interpreter and repository is bound over."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
    paths = {path: os.open(path, os.O_PATH) for path in (str(REPOSITORY), sys.base_prefix, sys.prefix)}
    for path, descriptor in paths.items():
        closed = [str(parent) for parent in reversed(Path(path).parents) if not os.stat(parent).st_mode & 0o001]
        if closed:
            libc.mount("none", closed[0], "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "mode=755")
        if not os.path.isdir(path):
            os.makedirs(path)
            libc.mount(f"/proc/self/fd/{descriptor}", path, "", libc.MS_BIND | libc.MS_REC)
        os.close(descriptor)
    os.setgroups([])
    os.setresgid(ORDINARY_ID, ORDINARY_ID, ORDINARY_ID)
    os.setresuid(ORDINARY_ID, ORDINARY_ID, ORDINARY_ID)
    libc.prctl(libc.PR_SET_DUMPABLE, 1)


def _case(row: dict[str, object], canary: Canary) -> Case:
    limits, mode = row.get("limits"), str(row.get("mode", "split"))
    expected = _words(row["expected"])
    return Case(
        name=str(row["name"]),
        file=str(row["file"]),
        code=_code(row, canary),
        tests=str(row.get("tests", INSIDE_TESTS if mode == "inside" else TESTS)),
        mode=mode,
        limits=Limits.from_request({**LIMITS, **(limits if isinstance(limits, dict) else {})}),
        expected=expected,
        expected_confined=_words(row["expected_confined"]) if "expected_confined" in row else expected,
    )


def _code(row: dict[str, object], canary: Canary) -> str:
    if "code" in row:
        return str(row["code"])
    if "attempt" in row:
        body = str(row["attempt"]).replace("CANARY_PORT", str(canary.port)).replace("CANARY_FOLDER", canary.folder)
        body = body.replace("CANARY_SOCKET", canary.abstract).replace("REPOSITORY", str(REPOSITORY))
        return _ATTEMPT.format(body=textwrap.indent(body, "    "))
    calls = row["calls"]
    assert isinstance(calls, list)
    present = [[numbers()[name], *rest] for name, *rest in calls if name in numbers()]
    return _CALLS.format(calls=present, wants_eperm=row.get("wants") == "EPERM")


def _words(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(str(word) for word in value)


@contextlib.contextmanager
def _canary() -> Iterator[Canary]:
    with tempfile.TemporaryDirectory(prefix="smelt-canary-") as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o755)
        Path(folder, "secret").write_text("secret")
        abstract = os.path.basename(folder)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for address in (f"{folder}/socket", f"\0{abstract}"):
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(address)
            unix.listen()
        os.chmod(f"{folder}/socket", 0o777)
        yield Canary(folder, listener.getsockname()[1], abstract)


def _present(slot: Slot) -> dict[str, int]:
    return {
        "processes": len(_descendants(os.getpid())),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files in the host's /tmp": sum(name.startswith("left-behind") for name in os.listdir("/tmp")),
        "memory": slot.usage_bytes(),
    }


def _left_behind(usual: dict[str, int], present: dict[str, int]) -> list[str]:
    slack = {"memory": MEMORY_SLACK_BYTES}
    more = {name: present[name] - usual[name] for name in usual}
    return [f"{count} {name}" for name, count in more.items() if count > slack.get(name, 0)]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found + [inner for child in found for inner in _descendants(child)]


if __name__ == "__main__":
    main()
