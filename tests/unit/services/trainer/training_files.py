"""A tiny base and rows on disk, and trainings of them in processes of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.trainer.costs.forecast import Cost
from services.trainer.costs.paces import Paces
from services.trainer.parallel.launch import TrainingProcesses
from services.trainer.plan import Prepared, prepare
from services.trainer.settings.training import parse_settings
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.testing.tiny_models import write_tiny_model

SETTINGS: dict[str, Any] = {
    "method": "full", "sequence_tokens": 64, "packs_per_step": 2, "learning_rate": "1e-3", "checkpoint_steps": 4,
}  # fmt: skip
DEADLINE_S = 120.0


def prepared_from(folder: Path, files: Sequence[str] = ("code.jsonl",), **settings: Any) -> Prepared:
    """A tiny base and rows that make some steps, the last of them with fewer packs than the others; or other `files`
    of its folder."""
    if not (folder / "base").is_dir():
        write_tiny_model(folder / "base", "qwen2")
        rows = ({"text": f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 3)} for n in range(39))
        (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lineage = Lineage(operation="import", code_revision="test")
    bundle = Bundle.from_folder(folder / "base", lineage=lineage, licence="Apache-2.0")
    parsed = parse_settings(json.dumps({**SETTINGS, **settings}))
    return prepare(folder / "base", bundle, [folder / name for name in files], None, parsed)


def write_spec(
    folder: Path, name: str, files: Sequence[str] = ("code.jsonl",), *, is_measured: bool = False, **settings: Any
) -> dict[str, Any]:
    """What the processes of a training in `folder`/`name` are told; the pace is known, so that none is measured.

    One that `is_measured` has four held-out rows, of another kind than those of training.
    """
    heldout = folder / "other.jsonl"
    heldout.write_text("".join(json.dumps({"text": f"{n} {n + 1} {n}"}) + "\n" for n in range(4)))
    prepared = prepared_from(folder, files, **settings)
    Paces(folder / "paces", 1).learn(prepared, Cost(time_s=1.0, memory_bytes=1 << 20, tokens=1000))
    spec = {
        "settings": {**SETTINGS, **settings}, "base": str(folder / "base"),
        "heldout": str(heldout) if is_measured else "",
        "data": [str(folder / name) for name in files], "licence": "Apache-2.0",
        "lineage": prepared.bundle.lineage.to_dict(), "threads": 1, "paces": str(folder / "paces"),
        "run_digest": "sha256:" + "0" * 64,
    }  # fmt: skip
    (folder / name).mkdir()
    (folder / name / "spec.json").write_text(json.dumps(spec))
    return spec


def wait_for_end(training: TrainingProcesses) -> None:
    """Returns once all processes have ended."""
    deadline_s = time.monotonic() + DEADLINE_S
    while training.are_running() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    training.stop()


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Every step that a training told of."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
