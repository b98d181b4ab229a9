"""Runs every benchmark after the other; a failing one is named at the end and fails the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OWN = {"__init__", "__main__", "results", "judge_endurance", "chaos", "upgrade"}


def main() -> int:
    """The number of benchmarks that failed."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in OWN)
    failed = [name for name in names if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    for name in failed:
        print(f"benchmark {name} failed", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
