"""The node's cache: each blob once on this machine's disk, shared by all artifacts and processes that use it.

    blobs/<hex>         verified files, read-only; the modification time is a seal that any later write breaks
    views/<id>/...      one folder a user, hard links to the blobs; `<id>.lock` is held while it is in use
    locks/<hex>         held while a blob is fetched, linked or evicted
    reserved/<hex>      as large as the blob that is being fetched: room that nobody else may fill

A blob with more than one link is in use, so eviction needs no bookkeeping: the kernel counts. A view whose lock can be
taken belongs to a process that died and is removed. A second start of a model finds every blob and moves no bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from smeltkit.blobs.store import Store
from smeltkit.errors import BadConfig, DiskFull, UnknownBlob
from smeltkit.ids import check_digest, digest_bytes, digest_file
from smeltkit.locks import file_lock, try_lock
from smeltkit.manifest import Descriptor, Manifest

_SEAL_S = 1
Fetch = Callable[[Path], None]


class NodeCache:
    """A cache below `folder` that keeps at most `max_bytes`, except for what is in use. Thread-safe; blocks."""

    def __init__(self, folder: Path, store: Store, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise BadConfig(f"a node cache of {max_bytes} bytes cannot hold anything; give it more than 0")
        self._store, self._max_bytes = store, max_bytes
        self._room_lock = folder / "room.lock"
        self._blobs, self._views = folder / "blobs", folder / "views"
        self._locks, self._reservations = folder / "locks", folder / "reserved"
        for path in (self._blobs, self._views, self._locks, self._reservations):
            path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def materialize(self, manifest: Manifest, *, paths: Sequence[str] | None = None) -> Iterator[Path]:
        """A folder with the artifact's files (those in `paths` if given), valid while the block runs.

        Fetches what is missing, once on this machine even if many ask. The files are shared and must not be written.
        UnknownBlob if `paths` names a file the artifact lacks; DiskFull if it does not fit beside what is in use.
        """
        layers = _chosen(manifest, paths)
        with self._view() as view:
            for layer in layers:
                target = view / layer.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self._link(layer.digest, layer.size_bytes, target, partial(self._store.fetch, layer.digest))
            yield view

    @contextmanager
    def derived(self, name: str, build: Fetch, *, size_bytes: int) -> Iterator[Path]:
        """A file made from artifacts, e.g. a converted model, valid while the block runs.

        `build` writes it to the path it is given, once on this machine; `name` must tell everything it depends on.
        Room is made for about `size_bytes` before it is built.
        """
        with self._view() as view:
            target = view / "file"
            self._link(digest_bytes(f"derived:{name}".encode()), size_bytes, target, build)
            yield target

    def size_bytes(self) -> int:
        """What the cached blobs take, and those that are being fetched will take."""
        return sum(size for _, size, _ in self._entries())

    def _link(self, digest: str, size_bytes: int, target: Path, fetch: Fetch) -> None:
        """Hard-links the blob to `target`, fetching it before unless it is there as it was left."""
        path = self._blobs / check_digest(digest).removeprefix("sha256:")
        with file_lock(self._locks / path.name):
            if _is_sealed(path) or _can_reseal(path, digest):
                os.utime(path, (time.time(), _SEAL_S))
            else:
                path.unlink(missing_ok=True)
                with self._reserved(path, size_bytes):
                    _make(path, fetch)
            os.link(path, target)

    @contextmanager
    def _reserved(self, path: Path, size_bytes: int) -> Iterator[None]:
        """Holds room for the block, evicting what was used longest ago; DiskFull if too much is in use."""
        reservation = self._reservations / path.name
        with file_lock(self._room_lock):
            self._reap()
            entries = sorted(self._entries())
            excess_bytes = sum(size for _, size, _ in entries) + size_bytes - self._max_bytes
            for _, size, entry in entries:
                if excess_bytes > 0 and self._evict(entry):
                    excess_bytes -= size
            if excess_bytes > 0:
                raise DiskFull(
                    f"the node cache of {self._max_bytes} bytes lacks {excess_bytes} for {size_bytes} more "
                    "beside what is in use; make the cache larger or stop a model"
                )
            reservation.touch()
            os.truncate(reservation, size_bytes)
        try:
            yield
        finally:
            reservation.unlink(missing_ok=True)

    def _evict(self, path: Path) -> bool:
        """Removes a blob that nobody fetches, links or uses."""
        lock = self._locks / path.name
        held = try_lock(lock)
        if held is None:
            return False
        try:
            if path.stat().st_nlink > 1:
                return False
            path.unlink()
            lock.unlink()
        except FileNotFoundError:
            pass
        finally:
            os.close(held)
        return True

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size in bytes and path of every blob and reservation."""
        entries = []
        for path in (*self._blobs.glob("[!.]*"), *self._reservations.iterdir()):
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_atime, status.st_size, path))
        return entries

    @contextmanager
    def _view(self) -> Iterator[Path]:
        view = self._views / secrets.token_hex(8)
        with file_lock(view.with_suffix(".lock")):
            view.mkdir()
            try:
                yield view
            finally:
                _remove_view(view)

    def _reap(self) -> None:
        """Removes what processes that died left: their views, reservations and interrupted fetches."""
        for lock in self._views.glob("*.lock"):
            held = try_lock(lock)
            if held is not None:
                _remove_view(lock.with_suffix(""))
                os.close(held)
        for left in (*self._reservations.iterdir(), *self._blobs.glob(".*")):
            held = try_lock(self._locks / left.name.lstrip(".").partition(".")[0])
            if held is not None:
                left.unlink(missing_ok=True)
                os.close(held)


def _chosen(manifest: Manifest, paths: Sequence[str] | None) -> tuple[Descriptor, ...]:
    if paths is None:
        return manifest.layers
    missing = sorted(path for path in paths if manifest.layer(path) is None)
    if missing:
        raise UnknownBlob(f"artifact {manifest.digest} has no file {', '.join(missing)}")
    return tuple(layer for layer in manifest.layers if layer.path in paths)


def _make(path: Path, fetch: Fetch) -> None:
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        fetch(unfinished)
        _seal(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_sealed(path: Path) -> bool:
    try:
        return path.stat().st_mtime == _SEAL_S
    except FileNotFoundError:
        return False


def _can_reseal(path: Path, digest: str) -> bool:
    """Whether a file that was touched still has its digest. A derived file has none and is made again."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if digest_file(file)[0] != digest:
            return False
    _seal(path)
    return True


def _seal(path: Path) -> None:
    path.chmod(0o444)
    os.utime(path, (time.time(), _SEAL_S))


def _remove_view(view: Path) -> None:
    shutil.rmtree(view, ignore_errors=True)
    view.with_suffix(".lock").unlink(missing_ok=True)
