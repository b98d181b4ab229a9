"""Folders of runs: kept while their job may go on from its checkpoints, removed once it cannot."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BusUnavailable, SmeltError, UnknownJob
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.tasks import pause
from smeltkit.locks import try_lock

_log = logging.getLogger(__name__)


class RunFolders:
    """The folders below `root`, one a job, each with a lock file beside it."""

    def __init__(self, root: Path, ledger: JobLedger) -> None:
        self._root, self._ledger = root, ledger

    def of(self, job_id: str) -> Path:
        """The folder of a job."""
        return self._root / job_id

    def lock_of(self, job_id: str) -> Path:
        """The lock that whoever works in it holds."""
        return self._root / f"{job_id}.lock"

    async def run(self, stop: asyncio.Event) -> None:
        """Removes folders of finished, failed and cancelled jobs now and then, until `stop` is set."""
        while not stop.is_set():
            try:
                await self.reap()
            except BusUnavailable as error:
                _log.debug("run folders: %s", error)
            await pause(stop, limits.TRAIN_REAP_PERIOD_S)

    async def reap(self) -> list[str]:
        """Removes the folders that no job needs any more, except for those that somebody works in; whose they were."""
        names = await asyncio.to_thread(lambda: {path.stem for path in self._root.glob("job-*")})
        over = [name for name in sorted(names) if await self._is_over(name)]
        return [name for name in over if await asyncio.to_thread(self._remove, name)]

    async def _is_over(self, job_id: str) -> bool:
        try:
            return (await self._ledger.read(job_id)).job.state in model.FINAL
        except UnknownJob:
            return True
        except BusUnavailable:
            raise
        except SmeltError as error:
            _log.warning("run folder %s stays: %s", job_id, error)
            return False

    def _remove(self, job_id: str) -> bool:
        held = try_lock(self.lock_of(job_id))
        if held is None:
            return False
        try:
            shutil.rmtree(self.of(job_id), ignore_errors=True)
            self.lock_of(job_id).unlink(missing_ok=True)
        finally:
            os.close(held)
        return True
