"""What takes long to show about the sandbox: `python -m benchmarks.judge_endurance mutations|executions|references`.

- `mutations`: 2,000 random mutations of the corpus's forgeries; none may score.
- `executions`: 100,000 runs in a row; latency, memory and descriptors of the first tenth beside those of the last.
- `references`: HumanEval and MBPP ten times in a row with eight busy neighbours; every reference passes every time.

Each is saved beside the other results. No part of `python -m benchmarks`: they take from minutes to an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from sandbox_service import (  # noqa: E402
    Service,
    children_of,
    humaneval_references,
    judge_all,
    mbpp_references,
    sandbox_service,
)
from smelt.sandbox.v1 import sandbox_pb2 as pb  # noqa: E402

PARTS = 10
NEIGHBOURS = 8
TIMEOUT_S = 3600
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """0 if everything held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("mutations", "executions", "references"))
    parser.add_argument("--count", type=int, default=0, help="of mutations, executions, or repetitions")
    parser.add_argument("--level", default="jail", help="of the mutations: jail, rootless or confined")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    arguments = parser.parse_args()
    if arguments.what == "mutations":
        rows, holds = mutations(arguments.level, arguments.count or 2_000, arguments.seed)
    elif arguments.what == "executions":
        rows, holds = executions(arguments.count or 100_000)
    else:
        rows, holds = references(arguments.count or 10)
    print(results.table(rows))
    results.save(f"judge_{arguments.what}", rows, holds=holds)
    return 0 if holds else 1


def mutations(level: str, count: int, seed: int) -> tuple[list[dict[str, Any]], bool]:
    """Verdicts of `count` mutations; holds if none passed and the slot judged on after each."""
    command = [sys.executable, str(ROOT / "tests" / "security" / "mutations.py"), level, str(count), str(seed)]
    *forged, summary = map(json.loads, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines())
    for program in forged:
        print(program["program"], program["verdict"], sep="\n# ", end="\n\n")
    return [{"level": level, "mutations": count, "forged": len(forged), **summary["verdicts"]}], not forged


def executions(count: int) -> tuple[list[dict[str, Any]], bool]:
    """What the service costs in each tenth of `count` verdicts; holds if all pass and nothing grows."""
    candidate = pb.Candidate(
        code=b"def f(n): return n + 1\n",
        form=pb.FORM_ASSERTS,
        tests="assert f(1) == 2\nassert f(2) == 3",
        exports=["f"],
    )
    rows = []
    with sandbox_service(slots=str(len(os.sched_getaffinity(0)))) as service:
        for part in range(PARTS):
            batch = {str(number): candidate for number in range(count // PARTS)}
            start = time.perf_counter()
            records = judge_all(service.stub, batch, timeout_s=TIMEOUT_S).values()
            elapsed_s = time.perf_counter() - start
            wall_ms = [record.wall_s * 1000 for record in records]
            rows.append(
                {
                    "runs": (part + 1) * len(batch),
                    "passed": sum(record.verdict == pb.VERDICT_PASSED for record in records),
                    "per_second": len(batch) / elapsed_s,
                    "p50_ms": statistics.median(wall_ms),
                    "p95_ms": statistics.quantiles(wall_ms, n=20)[-1],
                    "cpu_ms": statistics.mean(record.cpu_s * 1000 for record in records),
                    **_held(service),
                }
            )
    return rows, _is_steady(rows, count // PARTS)


def references(count: int) -> tuple[list[dict[str, Any]], bool]:
    """Passed references in each repetition, beside busy neighbours; holds if all of them pass."""
    rows = []
    with sandbox_service() as service, _neighbours():
        for repetition in range(count):
            row: dict[str, Any] = {"repetition": repetition + 1}
            for name, candidates in (("humaneval", humaneval_references()), ("mbpp", mbpp_references())):
                records = judge_all(service.stub, candidates, timeout_s=TIMEOUT_S)
                failed = [key for key, record in records.items() if record.verdict != pb.VERDICT_PASSED]
                row |= {name: len(records) - len(failed), f"{name}_of": len(candidates), f"{name}_failed": failed}
            rows.append(row)
            print(row, flush=True)
    return rows, not any(row["humaneval_failed"] or row["mbpp_failed"] for row in rows)


def _held(service: Service) -> dict[str, int]:
    """Resident memory and descriptors of the service, its supervisors and zygotes; candidates come and go."""
    supervisors = children_of(service.pid)
    zygotes = [pid for supervisor in supervisors for pid in children_of(supervisor)]
    inner = [pid for zygote in zygotes for pid in children_of(zygote)]
    tree = [service.pid, *supervisors, *zygotes, *inner]
    return {
        "service_mib": _resident_bytes([service.pid]) >> 20,
        "tree_mib": _resident_bytes(tree) >> 20,
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in tree),
        "processes": len(tree),
    }


def _resident_bytes(pids: Sequence[int]) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total


def _is_steady(rows: Sequence[dict[str, Any]], size: int) -> bool:
    """Whether the last parts cost no more memory, descriptors or CPU than the early ones after the first, which warms
    up: medians of three, since the machine's own speed changes within minutes."""
    early, late = (
        {name: statistics.median(row[name] for row in part) for name in ("tree_mib", "descriptors", "cpu_ms")}
        for part in (rows[1:4], rows[-3:])
    )
    grows = late["tree_mib"] > 1.1 * early["tree_mib"] + 8 or late["descriptors"] > early["descriptors"] + 16
    slows = late["cpu_ms"] > 1.25 * early["cpu_ms"]
    return all(row["passed"] == size for row in rows) and not grows and not slows


@contextmanager
def _neighbours() -> Iterator[None]:
    """Processes that never stop computing."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(NEIGHBOURS)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
