"""The processes of one training on this machine, started and ended together.

The error of any of them is that of the training; a process that was killed takes the others with it, and what is lost
is what was done since the last checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from smeltkit import limits
from smeltkit.config import environment
from smeltkit.errors import InternalError, ProcessLost
from smeltkit.gpus.ledger import Lease

LOG_FILE: Final = "log.txt"
RENDEZVOUS_FILE: Final = "rendezvous"


def outcome_file(folder: Path, rank: int) -> Path:
    """Where the process of a rank tells how it ended: the first one always, the others only of an error."""
    return folder / (f"outcome-{rank}.json" if rank else "outcome.json")


class TrainingProcesses:
    """Runs a module of the trainer on a folder, `count` times: `python -m services.trainer.MODULE FOLDER RANK`.

    They see the GPUs of `lease` and no others, and bear the name of its holder as their last argument.
    """

    def __init__(self, module: str, folder: Path, count: int, lease: Lease | None = None) -> None:
        self._folder = folder
        for rank in range(count):
            outcome_file(folder, rank).unlink(missing_ok=True)
        (folder / RENDEZVOUS_FILE).unlink(missing_ok=True)
        command = [sys.executable, "-m", f"services.trainer.{module}", str(folder)]
        holder = [lease.holder] if lease and lease.holder else []
        names = environment(lease.environment if lease else {})
        with (folder / LOG_FILE).open("ab") as log:
            self._processes = [
                subprocess.Popen(
                    [*command, str(rank), *holder], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=names
                )
                for rank in range(count)
            ]
        self._codes: list[int | None] = []

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def are_running(self) -> bool:
        """Whether there is still something to wait for: not once all have ended, or one of them badly."""
        self._codes = [process.poll() for process in self._processes]
        return None in self._codes and not any(self._codes)

    def stop(self) -> None:
        """Asks what still runs to save and end, then ends it; at once where one is lost and the others wait for it."""
        is_broken = any(self._codes)
        for process in self._processes:
            process.kill() if is_broken else process.terminate()
        deadline_s = time.monotonic() + limits.JOB_CANCEL_GRACE_S / 3
        for process in self._processes:
            try:
                process.wait(max(deadline_s - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def outcome(self) -> dict[str, Any]:
        """What the training told at its end; ProcessLost if one of its processes was killed."""
        found = [
            json.loads(path.read_text())
            for rank in range(len(self._processes))
            if (path := outcome_file(self._folder, rank)).is_file()
        ]
        for each in found:
            if "reason" in each:
                return dict(each)
        killed = [(rank, -code) for rank, code in enumerate(self._codes) if code is not None and code < 0]
        if killed:
            raise ProcessLost(
                f"process {killed[0][0]} of {len(self._processes)} of the training was killed by signal {killed[0][1]};"
                " the job goes on from its last checkpoint"
            )
        if not found:
            tail = (self._folder / LOG_FILE).read_text(errors="replace").strip().splitlines()[-1:]
            raise InternalError(f"the training ended with {self._codes}: {' '.join(tail)[:300]}")
        outcome: dict[str, Any] = found[0]
        return outcome
