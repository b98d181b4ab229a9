"""The platform goes from one release to the next and back while evaluations run, pod by pod, both side by side.

    python -m benchmarks.upgrade [--from COMMIT] [--seed S]

A cluster of the release at COMMIT (default: the newest tag, else the commit before this one) is rolled to this one and
back again, one pod of each service after the other, each with the settings of its release. At each step two evaluations
are under way, started by whichever gateway answers and done by whichever evaluator is free; they must end as
`scripts.cluster.chaos` demands.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import results
from scripts.cluster.caller import calling
from scripts.cluster.chaos import Fault, Scene, Strike, play, scene_of
from scripts.cluster.cluster import COUNTS, Cluster, running_cluster

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("sandbox", "inference", "evaluator", "gateway")
"""What is called goes before what calls it."""


def main() -> int:
    """Exit status: 0 if nothing was wrong at any step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upgrade")
    parser.add_argument("--from", dest="start", default=_previous())
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    start = _git("rev-parse", "--short", chosen.start)
    with _checkout(start) as old, running_cluster(root=old) as cluster:
        rows = asyncio.run(drill(cluster, old, chosen.seed))
    print(results.table(rows))
    is_met = not any(row["wrong"] for row in rows)
    facts = {"from": start, "to": _git("rev-parse", "--short", "HEAD"), "seed": chosen.seed, "pods": dict(COUNTS)}
    print(results.save("upgrade", rows, is_met=is_met, **facts))
    return 0 if is_met else 1


async def drill(cluster: Cluster, old: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each pod that was rolled: forth to this release, then back to the one in the folder `old`."""
    rows = []
    async with calling(cluster) as caller:
        scene = await scene_of(cluster, caller, seed)
        for direction, root in (("forth", None), ("back", old)):
            for service in ORDER:
                for number in range(COUNTS[service]):
                    name = f"{direction}-{service}-{number}"
                    played = await play(scene, Fault(name=name, strike=_roll(service, number, root)), name)
                    rows.append(
                        {"step": name, "seconds": played.seconds, "attempts": played.attempts, "wrong": played.wrong}
                    )
                    print(rows[-1], flush=True)
    return rows


def _roll(service: str, number: int, root: Path | None) -> Strike:
    async def strike(scene: Scene) -> str:
        pods = scene.cluster.pods[service]
        code = await asyncio.to_thread(pods[number].terminate)
        pods[number] = scene.cluster.pod(service, number, root)
        await asyncio.to_thread(pods[number].start)
        return "" if code == 0 else f"{service} ended with {code} on SIGTERM"

    return strike


@contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="smelt-release-") as folder:
        path = Path(folder) / "release"
        _git("worktree", "add", "--detach", str(path), commit)
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _previous() -> str:
    return _git("tag", "--sort=-creatordate").partition("\n")[0] or "HEAD~1"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
