"""Faults on a cluster of one machine, many rounds each at random moments: what was lost, doubled or never ended.

    python -m benchmarks.chaos [--rounds N] [--seed S] [--pause-while FILE] [--afresh] [FAULT ...]

Without names every fault of `scripts.cluster.chaos`, those with the fewest rounds first, each on a cluster of its own.
Each round is saved as it ends (`chaos_rounds.jsonl`), and another run goes on from there: round 7 of a fault and a seed
is the same whenever it is played. Several runs at once share the faults among them. A wrong round ends its cluster, so
that it spoils no other, and leaves its logs in `build/chaos`. `--afresh` forgets the rounds of the faults before; while
FILE exists no cluster runs. The full disk needs root, to mount a small file system in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from scripts.cluster.caller import calling
from scripts.cluster.chaos import CLOCKED, FAULTS, JOBS, LIMIT, S3_DOWN_S, Fault, Round, clock_settings, play, scene_of
from scripts.cluster.cluster import COUNTS, Cluster, running_cluster
from smeltkit.locks import file_lock, try_lock
from smeltkit.revision import code_revision

NAME = "chaos"
ROUNDS = results.FOLDER / "chaos_rounds.jsonl"
KEPT = results.FOLDER.parents[1] / "build" / "chaos"
CODE = ("smeltkit", "services", "gateway")
DISK = "192m"
_LOCKS = Path(tempfile.gettempdir())
_LOOK_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is played of each fault."""

    rounds: int
    seed: int
    pause_while: Path | None

    @property
    def is_paused(self) -> bool:
        """Whether the machine is wanted for something else."""
        return self.pause_while is not None and self.pause_while.exists()

    def missing(self, fault: Fault) -> list[int]:
        """Numbers of the rounds that nobody has played."""
        played = {one["round"] for one in saved(fault.name) if one["seed"] == self.seed}
        return [number for number in range(self.rounds) if number not in played]


def main() -> int:
    """Exit status: 0 if nothing was wrong in any round of the faults that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of: {', '.join(FAULTS)}")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause-while", type=Path, metavar="FILE")
    parser.add_argument("--afresh", action="store_true")
    told = vars(parser.parse_args())
    names, is_afresh = told.pop("faults") or list(FAULTS), told.pop("afresh")
    if unknown := set(names) - set(FAULTS):
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    if is_afresh:
        _forget(names)
    plan = Plan(**told)
    for name in sorted(names, key=lambda name: len(saved(name))):
        with _turn(name) as is_ours:
            while is_ours and plan.missing(FAULTS[name]):
                go_on(FAULTS[name], plan)
    rows = [_row(FAULTS[name], found) for name in names if (found := saved(name))]
    print(results.table([{key: value for key, value in row.items() if key not in ("wrong", "code")} for row in rows]))
    return 1 if any(row["bad_rounds"] for row in rows) else 0


def go_on(fault: Fault, plan: Plan) -> None:
    """Plays missing rounds on a fresh cluster: all, or up to one that is wrong or a pause."""
    while plan.is_paused:
        time.sleep(_LOOK_S)
    with _cluster_for(fault) as cluster:
        asyncio.run(_rounds(cluster, fault, plan))


async def _rounds(cluster: Cluster, fault: Fault, plan: Plan) -> None:
    async with calling(cluster) as caller:
        scene = await scene_of(cluster, caller, plan.seed)
        for number in plan.missing(fault):
            if plan.is_paused:
                return
            scene.chance = random.Random(f"{plan.seed} {fault.name} {number}")
            try:
                found = await play(scene, fault, f"round-{number}")
            except Exception as error:  # whatever breaks a round is its outcome
                found = Round(wrong=[repr(error)])
            line = {"fault": fault.name, "seed": plan.seed, "round": number, "code": code_revision(CODE)}
            _save(line | asdict(found))
            print(f"{fault.name} {number}: {found}", flush=True)
            if found.wrong or found.restarts:
                _keep_logs(cluster, f"{fault.name.replace(' ', '-')}-{number}")
            if found.wrong:
                return


def _keep_logs(cluster: Cluster, name: str) -> None:
    """What every process of the cluster wrote, for whoever looks for the cause."""
    target = KEPT / name
    shutil.rmtree(target, ignore_errors=True)
    for root in (cluster.folder, cluster.s3.folder):
        for path in [*root.glob("*/log"), *root.glob("*.log"), *root.glob("*/*.log")]:
            kept = target / path.relative_to(root)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)


def saved(fault: str) -> list[dict[str, Any]]:
    """The rounds of a fault so far."""
    lines = ROUNDS.read_text().splitlines() if ROUNDS.is_file() else []
    return [one for one in map(json.loads, lines) if one["fault"] == fault]


@contextmanager
def _turn(fault: str) -> Iterator[bool]:
    """Whether this run is the one that plays the fault during the block."""
    held = try_lock(_LOCKS / f"smelt-{NAME}-{fault.replace(' ', '-')}.lock")
    try:
        yield held is not None
    finally:
        if held is not None:
            os.close(held)


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


def _row(fault: Fault, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds, attempts = [one["seconds"] for one in found], [one["attempts"] for one in found]
    return {
        "fault": fault.name,
        "rounds": len(found),
        "bad_rounds": sum(bool(one["wrong"]) for one in found),
        "evaluations": JOBS * len(found),
        "problems": LIMIT,
        "ended_with_the_faults_reason": sum(one["failed"] for one in found),
        "attempts_max": max(attempts),
        "rounds_with_another_attempt": sum(count > 1 for count in attempts),
        "store_restarts": sum(one["restarts"] for one in found),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "code": dict(Counter(one["code"] for one in found)),
        "wrong": [line for one in found for line in one["wrong"]],
    }


def _forget(faults: Sequence[str]) -> None:
    with file_lock(_LOCKS / f"smelt-{NAME}.lock", timeout_s=60):
        kept = [one for name in FAULTS if name not in faults for one in saved(name)]
        ROUNDS.write_text("".join(json.dumps(one) + "\n" for one in kept))


def _save(line: Mapping[str, Any]) -> None:
    """Adds a round, and brings the rows of the faults that have any up to date; others stay as they are."""
    with file_lock(_LOCKS / f"smelt-{NAME}.lock", timeout_s=60):
        with ROUNDS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        path = results.FOLDER / f"{NAME}.json"
        rows = json.loads(path.read_text())["rows"] if path.is_file() else []
        kept = {row["fault"]: row for row in rows}
        kept |= {name: _row(FAULTS[name], found) for name in FAULTS if (found := saved(name))}
        ordered = [kept[name] for name in FAULTS if name in kept]
        results.save(NAME, ordered, pods=dict(COUNTS), s3_down_s=S3_DOWN_S)


if __name__ == "__main__":
    sys.exit(main())
