"""The processes of one training, started and ended together.

One alone is started as it is; of several, torch's agent (`node`) starts those of this machine, and all again where one
is lost. The error of any of them is that of the training; what is lost is what was done since the last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from services.trainer.parallel.groups import LOOPBACK, RESTARTS_FILE, Group, end_group
from smeltkit import limits
from smeltkit.config import environment
from smeltkit.errors import InternalError, ProcessLost, SmeltError
from smeltkit.gpus.ledger import Lease

LOG_FILE: Final = "log.txt"
_PREPARING_FILE: Final = "preparing.txt"


def outcome_file(folder: Path, rank: int) -> Path:
    """Where the process of a rank tells how it ended: the first one always, the others only of an error."""
    return folder / (f"outcome-{rank}.json" if rank else "outcome.json")


def tell_preparing(folder: Path, what: str) -> None:
    """Says what a training is about before its first step."""
    (folder / _PREPARING_FILE).write_text(what)


def preparing(folder: Path) -> str:
    """What a training last said that it is about, and for how long; empty if nothing."""
    path = folder / _PREPARING_FILE
    try:
        return f"{path.read_text()}, for {time.time() - path.stat().st_mtime:.0f} s"
    except FileNotFoundError:
        return ""


def error_of(error: SmeltError) -> dict[str, Any]:
    """An error as part of an outcome."""
    return {"reason": error.reason(), "message": error.message}


def write_outcome(path: Path, outcome: Mapping[str, Any]) -> None:
    """Leaves how a process ended, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(outcome))
    os.replace(fresh, path)


def write_error(folder: Path, error: SmeltError) -> None:
    """Leaves an error as outcome of a training whose processes cannot tell it themselves."""
    write_outcome(folder / "outcome-group.json", error_of(error))


def errors_told(folder: Path) -> list[dict[str, Any]]:
    """Outcomes of a training's processes that are errors."""
    return [told for told in _outcomes(folder) if "reason" in told]


class TrainingProcesses:
    """Runs a module of the trainer on a folder in `count` processes: `python -m services.trainer.MODULE FOLDER`.

    They see the GPUs of `lease` and no others, and bear the name of its holder as their last argument. Those of
    several `nodes` meet at `address`, see `groups`.
    """

    def __init__(
        self, module: str, folder: Path, count: int, lease: Lease | None = None, *,
        nodes: int = 1, address: str = LOOPBACK, restarts: int = limits.TRAIN_RESTARTS_MAX,
    ) -> None:  # fmt: skip
        self._folder = folder
        for path in (*folder.glob("outcome*.json"), folder / RESTARTS_FILE, folder / _PREPARING_FILE):
            path.unlink(missing_ok=True)
        run = f"services.trainer.{module}"
        if count > 1:
            group = Group(module=run, nodes=nodes, processes=count // nodes, address=address, restarts=restarts)
            group.write(folder)
            run = "services.trainer.parallel.node"
        holder = [lease.holder] if lease and lease.holder else []
        command = [sys.executable, "-m", run, str(folder), *holder]
        names = environment(lease.environment if lease else {})
        with (folder / LOG_FILE).open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=names)

    @property
    def pid(self) -> int:
        """Of the process, or of the agent of several."""
        return self._process.pid

    def are_running(self) -> bool:
        """Whether there is still something to wait for."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Asks what still runs to save and end, then ends it."""
        self._process.terminate()
        try:
            self._process.wait(limits.JOB_CANCEL_GRACE_S / 3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        end_group(self._folder)

    def outcome(self) -> dict[str, Any]:
        """What the training told at its end; ProcessLost if one of its processes was killed."""
        found, code = [*errors_told(self._folder), *_outcomes(self._folder)], self._process.returncode
        if not found and code < 0:
            raise ProcessLost(f"the training was killed by signal {-code}; the job goes on from its last checkpoint")
        if not found:
            tail = (self._folder / LOG_FILE).read_text(errors="replace").strip().splitlines()[-1:]
            raise InternalError(f"the training ended with {code}: {' '.join(tail)[:300]}")
        return found[0]


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("outcome*.json"))]
