"""Folders for work under way: private, on the cache's file system, and gone afterwards whatever happens.

A folder whose lock can be taken belongs to a process that died; the next start removes it, so nothing half-written
stays.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smeltkit.locks import file_lock, try_lock


class Workspaces:
    """Makes folders below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder that lives as long as the block."""
        path = self._root / secrets.token_hex(8)
        with file_lock(path.with_suffix(".lock")):
            path.mkdir()
            try:
                yield path
            finally:
                _remove(path)

    def reap(self) -> int:
        """Removes what dead processes left; how many folders that were."""
        count = 0
        for lock in self._root.glob("*.lock"):
            held = try_lock(lock)
            if held is not None:
                _remove(lock.with_suffix(""))
                os.close(held)
                count += 1
        return count


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.with_suffix(".lock").unlink(missing_ok=True)
