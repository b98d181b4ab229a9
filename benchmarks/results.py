"""How every benchmark reports: one table for people, one JSON file below benchmarks/results for machines."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16")


def machine() -> dict[str, Any]:
    """What a ratio depends on and nothing that names a machine: cores, CPU features, kernel, Python."""
    text = Path("/proc/cpuinfo").read_text()
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return {
        "cores": text.count("processor\t"),
        "features": [name for name in _FEATURES if name in flags],
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def save(name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    """Writes `rows` and `facts` (versions, settings, targets) as benchmarks/results/<name>.json."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        **facts,
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as aligned columns; floats with three significant digits."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the pairwise ratios of alternating runs: drift of the machine cancels within a pair."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
