"""Paces of trainings on this machine, each measured once, in a process of its own, and kept beside the cache."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from services.trainer.forecast import Pace
from services.trainer.plan import Prepared
from smeltkit import limits
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json

_log = logging.getLogger(__name__)
_WITHOUT_EFFECT = ("seed", "epochs", "max_steps", "learning_rate", "schedule", "warmup_steps", "horizon_steps")
"""Settings that a step's pace does not depend on, with others that only matter beyond a step."""


class Paces:
    """Measures paces with `threads` threads (0: as many as torch takes) and keeps them below `folder`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads

    def of(self, prepared: Prepared) -> Pace | None:
        """The pace of a training; None, and a line in the log, where it cannot be measured."""
        asked = canonical_json(
            {
                "config": prepared.config.to_dict(),
                "settings": {k: v for k, v in asdict(prepared.settings).items() if k not in _WITHOUT_EFFECT},
                "packs": [[prepared.order.lengths[number] for number in pack] for pack in prepared.order.at(0)],
                "threads": self.threads,
            }
        )
        path = self.folder / f"{digest_bytes(asked).removeprefix('sha256:')}.json"
        if path.is_file():
            return Pace(**json.loads(path.read_bytes()))
        measured = _measure(asked)
        if measured is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(asdict(measured)))
        path.with_suffix(".new").rename(path)
        return measured


def _measure(asked: bytes) -> Pace | None:
    command = [sys.executable, "-m", "services.trainer.pace"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=limits.TRAIN_PACE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        _log.warning("the pace was not measured within %g s; the plan tells no time", limits.TRAIN_PACE_TIMEOUT_S)
        return None
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        _log.warning("the pace cannot be measured: %s", " ".join(tail)[:300])
        return None
    return Pace(**json.loads(done.stdout))
