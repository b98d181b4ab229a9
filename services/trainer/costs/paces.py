"""Paces of trainings on this machine, each measured in a process of its own and kept beside the cache.

One that was measured while other work held the processors is soon measured again, and what a run really took corrects
what is kept.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from services.trainer.costs.forecast import Cost, Pace, learnt
from services.trainer.plan import Prepared
from services.trainer.settings.training import OBSERVING
from smeltkit import limits
from smeltkit.config import environment
from smeltkit.gpus import holders
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json

_log = logging.getLogger(__name__)
WITHOUT_EFFECT = (
    *OBSERVING,
    "nodes",
    "seed",
    "stages",
    "epochs",
    "max_steps",
    "min_tokens",
    "mix",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "horizon_steps",
    "early_stop",
)
"""Settings that a step's pace does not depend on, with others that only matter beyond a step."""


class Paces:
    """Measures paces with `threads` threads (0: as many as torch takes) and keeps them below `folder`."""

    def __init__(self, folder: Path, threads: int, names: Mapping[str, str] | None = None) -> None:
        self.folder, self.threads, self._names = folder, threads, names or {}

    def seeing(self, names: Mapping[str, str]) -> Paces:
        """These paces, measured by processes with `names` in their environment."""
        return Paces(self.folder, self.threads, names)

    def of(self, prepared: Prepared) -> Pace | None:
        """The pace of a training; None, and a line in the log, where it cannot be measured."""
        asked = self._asked(prepared)
        kept = self._kept(asked)
        if kept is not None:
            return kept
        measured = _measure(asked, environment(self._names))
        if measured is not None:
            self._keep(asked, measured)
        return measured

    def learn(self, prepared: Prepared, took: Cost) -> None:
        """Corrects what is kept by what a run of this training took; of several processes each kept its share of it."""
        took = replace(took, time_s=took.time_s * prepared.settings.processes)
        asked = self._asked(prepared)
        self._keep(asked, learnt(self._kept(asked), took))

    def _asked(self, prepared: Prepared) -> bytes:
        """All that the pace depends on, for the process that measures it."""
        return canonical_json(
            {
                "config": prepared.config.to_dict(),
                "settings": {k: v for k, v in asdict(prepared.settings).items() if k not in WITHOUT_EFFECT},
                "packs": [[prepared.order.lengths[number] for number in pack] for pack in prepared.order.at(0)],
                "threads": self.threads,
            }
        )

    def _path(self, asked: bytes) -> Path:
        return self.folder / f"{digest_bytes(asked).removeprefix('sha256:')}.json"

    def _kept(self, asked: bytes) -> Pace | None:
        path = self._path(asked)
        if not path.is_file():
            return None
        pace, age_s = Pace(**json.loads(path.read_bytes())), time.time() - path.stat().st_mtime
        return pace if pace.is_quiet or age_s < limits.TRAIN_BUSY_PACE_KEPT_S else None

    def _keep(self, asked: bytes, pace: Pace) -> None:
        path = self._path(asked)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(json.dumps(asdict(pace)))
        path.with_suffix(".new").rename(path)


def _measure(asked: bytes, names: Mapping[str, str]) -> Pace | None:
    command = [sys.executable, "-m", "services.trainer.costs.pace", holders.PLANS]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=limits.TRAIN_PACE_TIMEOUT_S, env=names)
    except subprocess.TimeoutExpired:
        _log.warning("the pace was not measured within %g s; the plan tells no time", limits.TRAIN_PACE_TIMEOUT_S)
        return None
    if done.returncode:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        _log.warning("the pace cannot be measured: %s", " ".join(tail)[:300])
        return None
    return Pace(**json.loads(done.stdout))
