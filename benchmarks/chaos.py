"""Faults on a cluster of one machine, many rounds each at random moments: what was lost, doubled or never ended.

    python -m benchmarks.chaos [--rounds N] [--seed S] [--s3-down-s SECONDS] [FAULT ...]

Without names every fault of `scripts.cluster.chaos`, each on a cluster of its own. A row says how many rounds were
played, how many had anything wrong, and how long they took; a fault that is run again replaces its row. The full disk
needs root, to mount a small file system in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results
from scripts.cluster.caller import calling
from scripts.cluster.chaos import CLOCKED, FAULTS, JOBS, LIMIT, Fault, Round, clock_settings, play, scene_of
from scripts.cluster.cluster import COUNTS, Cluster, running_cluster
from smeltkit.locks import file_lock

NAME = "chaos"
DISK = "192m"


def main() -> int:
    """Exit status: 0 if nothing was wrong in any round."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {', '.join(FAULTS)}")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--s3-down-s", type=float, default=20.0)
    chosen = parser.parse_args()
    rows = []
    for name in chosen.faults or FAULTS:
        with _cluster_for(FAULTS[name]) as cluster:
            rows.append(asyncio.run(rounds(cluster, FAULTS[name], chosen)))
    print(results.table([{key: row[key] for key in row if key != "wrong"} for row in rows]))
    return 1 if any(row["bad_rounds"] for row in rows) else 0


async def rounds(cluster: Cluster, fault: Fault, chosen: argparse.Namespace) -> dict[str, Any]:
    """The row of a fault, saved after every round."""
    found: list[Round] = []
    async with calling(cluster) as caller:
        scene = await scene_of(cluster, caller, chosen.seed, s3_down_s=chosen.s3_down_s)
        for number in range(chosen.rounds):
            found.append(await play(scene, fault, f"round-{number}"))
            row = _row(fault, found, chosen)
            _save(row)
            print(f"{fault.name} {number + 1}: {found[-1]}", flush=True)
    return row


@contextmanager
def _cluster_for(fault: Fault) -> Iterator[Cluster]:
    def extra(service: str, folder: Path) -> Mapping[str, str]:
        return clock_settings(folder) if fault.needs == "clock" and service in CLOCKED else {}

    with ExitStack() as stack:
        disk = stack.enter_context(_small_disk()) if fault.needs == "small disk" else None
        yield stack.enter_context(running_cluster(extra=extra, s3_folder=disk))


@contextmanager
def _small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="smelt-disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "smelt", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def _row(fault: Fault, found: Sequence[Round], chosen: argparse.Namespace) -> dict[str, Any]:
    row = {
        "fault": fault.name,
        "rounds": len(found),
        "bad_rounds": sum(bool(one.wrong) for one in found),
        "evaluations": JOBS * len(found),
        "ended_with_the_faults_reason": sum(one.failed for one in found),
        "attempts_max": max(one.attempts for one in found),
        "rounds_with_another_attempt": sum(one.attempts > 1 for one in found),
        "seconds_median": statistics.median(one.seconds for one in found),
        "seconds_max": max(one.seconds for one in found),
        "seed": chosen.seed,
        "wrong": [line for one in found for line in one.wrong],
    }
    return row | ({"s3_down_s": chosen.s3_down_s} if fault.name == "S3 away" else {})


def _save(row: Mapping[str, Any]) -> None:
    """Puts the row among those of the other faults, of whichever run."""
    with file_lock(Path(tempfile.gettempdir()) / "smelt-chaos.lock", timeout_s=60):
        path = results.FOLDER / f"{NAME}.json"
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        kept = {old["fault"]: old for old in rows} | {row["fault"]: row}
        ordered = [kept[name] for name in FAULTS if name in kept]
        results.save(NAME, ordered, pods=dict(COUNTS), problems=LIMIT)


if __name__ == "__main__":
    sys.exit(main())
