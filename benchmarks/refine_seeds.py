"""What `make demo-refine` trains, with several seeds: does it help, or was the shown seed lucky?

    python -m benchmarks.refine_seeds [--seeds N]

Each seed draws its own adapters, order and packs from the same rows; all else is the shipped file's. The start is
scored once. A row a seed: held-out loss before and after, problems solved of `basic` and the test of the difference in
pairs, both models as Q8_0. `mean` is the gain over all seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from scripts.demo import BASIC, MODEL, smelt
from scripts.demo_refine import SCHEME, TRAINING
from smeltkit.ids import digest_bytes

NAME = "refine_seeds"


def main() -> int:
    """Exit status: 1 if not every seed's gain lies beyond its interval."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refine_seeds")
    parser.add_argument("--seeds", type=int, default=3)
    told = parser.parse_args()
    os.environ.setdefault("SMELT_TRAINER_THREADS", "1")
    smelt("up")
    smelt("import", str(MODEL), "--name", "ore-11m")
    start = _report("ore-11m")
    rows = [_row(seed, start) for seed in range(told.seeds)]
    mean = statistics.mean(row["difference"] for row in rows)
    results.save(NAME, rows, scheme=SCHEME, training=training_digest(), mean=mean)
    print(results.table(rows))
    return int(any(row["low"] <= 0 for row in rows))


def training_digest() -> str:
    """Digest of the shipped training: its file and its data."""
    return digest_bytes(b"".join(path.read_bytes() for path in sorted(TRAINING.parent.iterdir())))


def _row(seed: int, start: dict[str, Any]) -> dict[str, Any]:
    name = f"ore-11m:refined-{seed}"
    trained = _trained(name, seed)
    report = _report(name)
    compared = smelt("compare", start["digest"], report["digest"])
    return {
        "seed": seed,
        **{f"loss_{when}": trained["heldout"][when] for when in ("before", "after")},
        **{f"solved_{when}": one["scores"][0]["passed"] for when, one in (("before", start), ("after", report))},
        **{field: compared[field] for field in ("difference", "low", "high", "p_value", "verdict")},
    }


def _trained(name: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for path in TRAINING.parent.glob("*.jsonl"):
            (Path(folder) / path.name).symlink_to(path)
        file = Path(folder) / TRAINING.name
        file.write_text(TRAINING.read_text().replace("ore-11m:refined", name) + f"seed: {seed}\n")
        return smelt("train", "apply", str(file))


def _report(name: str) -> dict[str, Any]:
    quantized = f"{name}-{SCHEME.lower()}" if ":" in name else f"{name}:{SCHEME.lower()}"
    smelt("quantize", name, "--scheme", SCHEME, "--name", quantized)
    return smelt("eval", "--suite", "basic", "--data", str(BASIC), quantized)


if __name__ == "__main__":
    sys.exit(main())
