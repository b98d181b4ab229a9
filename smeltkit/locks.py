"""Locks between processes of a machine: advisory, on an empty file, given back by the kernel when the holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import Timeout


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock of `path` until it is closed, or None while somebody else holds it.

    Excludes threads of this process as well as other processes. Its holder may remove the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def file_lock(path: Path, *, timeout_s: float = limits.FILE_LOCK_WAIT_S) -> Iterator[None]:
    """Holds the lock of `path` for the block; Timeout if its holder does not give it back in `timeout_s` seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise Timeout(f"{path} is locked by another process for more than {timeout_s:g} s; wait for it, or stop it")
        time.sleep(limits.FILE_LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)
