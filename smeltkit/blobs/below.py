"""A store below a prefix of another one: several in one bucket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.source import Source
from smeltkit.blobs.store import Progress


class StoreBelow(ObjectStore):
    """The objects of `store` whose keys begin with `prefix`/, as a store of their own."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, f"{prefix.strip('/')}/"

    def _write(self, key: str, data: bytes) -> None:
        self._store._write(self._prefix + key, data)

    def _upload(self, key: str, source: Source, progress: Progress) -> None:
        self._store._upload(self._prefix + key, source, progress)

    def _read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        return self._store._read(self._prefix + key, offset, size_bytes)

    def _download(self, key: str, file: BinaryIO, size_bytes: int) -> Iterator[int]:
        return self._store._download(self._prefix + key, file, size_bytes)

    def _stat(self, key: str) -> tuple[int, float] | None:
        return self._store._stat(self._prefix + key)

    def _entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        for key, size_bytes, modified_s in self._store._entries(self._prefix + prefix):
            yield key.removeprefix(self._prefix), size_bytes, modified_s

    def _delete(self, key: str) -> None:
        self._store._delete(self._prefix + key)
