"""Tokenizing a training's data: by several processes into the cache, and found there, beside one process row by row.

    python -m benchmarks.tokenize [FILE ...]     JSONL; by default the shipped rows

Each file is read as often over as makes SIZE_MIB. Runs alternate; a ratio is one process's time by ours, in pairs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results
from services.trainer.data.dataset import read_dataset
from services.trainer.data.kept import keep_samples
from services.trainer.data.recipe import Recipe
from services.trainer.data.tokenize import processes_for
from services.trainer.settings.training import TrainSettings
from smeltkit import limits
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.local import LocalStore
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE = EXAMPLES / "models" / "ore-11m"
SIZE_MIB, RUNS = 16, 3
FLOORS = {"first run": 0.9, "second run": 20.0}


def main(files: list[Path]) -> int:
    """How many ratios lie below their floor."""
    rows = [row for file in files for row in _compare(file)]
    print(results.table(rows))
    results.save("tokenize", rows, floors=FLOORS, size_mib=SIZE_MIB, load=os.getloadavg()[0])
    return sum(row["ratio"] < FLOORS[row["contender"]] for row in rows)


def _compare(file: Path) -> list[dict[str, Any]]:
    source = file.read_bytes()
    data = source * -(-SIZE_MIB * limits.MIB // len(source))
    runs = [_run(data, number) for number in range(RUNS)]
    one = [run["one process"] for run in runs]
    return [
        {
            "file": file.name,
            "contender": who,
            "processes": processes_for(len(data)) if who == "first run" else 1,
            "ratio": results.median_ratio(one, [run[who] for run in runs]),
        }
        for who in ("first run", "second run")
    ]


def _run(data: bytes, number: int) -> dict[str, float]:
    """Seconds of each contender on fresh files; of the first two the other one goes first in every other run."""
    contract = Bundle.from_folder(BASE, lineage=Lineage(operation="import", code_revision="benchmark")).contract
    recipe = Recipe.of(contract, TrainSettings(sequence_tokens=1024))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data.jsonl").write_bytes(data)
        store = LocalStore(folder / "store")
        digest, _ = store.put_file(folder / "data.jsonl")
        cache = NodeCache(folder / "cache", store, limits.GIB)

        def keep(which: str) -> None:
            (folder / which).mkdir()
            keep_samples(store, cache, digest, BASE, recipe, folder / which, "data", lambda rows: None)

        def read() -> None:
            read_dataset(folder / "data.jsonl", recipe.encoder(BASE), recipe.sequence_tokens)

        order = [("one process", read), ("first run", lambda: keep("first"))]
        order = [*(order if number % 2 else reversed(order)), ("second run", lambda: keep("second"))]
        return {who: _seconds(action) for who, action in order}


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or sorted((EXAMPLES / "refine").glob("*.jsonl"))[-1:]))
