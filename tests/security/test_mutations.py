"""Random mutations of forgeries never score, at any level; `python -m benchmarks.judge_endurance` runs thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from test_corpus import LEVELS

PROGRAM = Path(__file__).with_name("mutations.py")
COUNT = 120
SEED = 20240229
TIMEOUT_S = 280


def test_mutated_forgeries_score_nothing() -> None:
    """R-083: the same seed gives the same programs; a line that names one is a forgery to look at."""
    command = [sys.executable, str(PROGRAM)]
    started = {
        level: subprocess.Popen([*command, level, str(COUNT), str(SEED + number)], stdout=subprocess.PIPE, text=True)
        for number, level in enumerate(LEVELS)
    }
    try:
        for level, process in started.items():
            text, _ = process.communicate(timeout=TIMEOUT_S)
            *forged, summary = [json.loads(line) for line in text.splitlines()]
            assert process.returncode == 0 and forged == [], level
            assert sum(summary["verdicts"].values()) == COUNT and len(summary["verdicts"]) >= 5
    finally:
        for process in started.values():
            process.kill()
