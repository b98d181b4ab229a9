"""A store in a folder: for one machine without a server, and the yardstick the S3 store is tested against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from smeltkit import limits
from smeltkit.blobs.objects import ObjectStore, new_file
from smeltkit.blobs.source import Source
from smeltkit.blobs.store import Progress
from smeltkit.errors import UnknownBlob


class LocalStore(ObjectStore):
    """Objects as files below `folder`; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def is_empty(self) -> bool:
        """Whether the folder is empty or does not exist; it is not searched."""
        return not self._folder.exists() or next(self._folder.iterdir(), None) is None

    def _write(self, key: str, data: bytes) -> None:
        with new_file(self._folder / key) as file:
            file.write(data)

    def _upload(self, key: str, source: Source, progress: Progress) -> None:
        body = source.slice(0, source.size_bytes)
        with new_file(self._folder / key) as file:
            while block := body.read(limits.STORE_BLOCK_BYTES):
                file.write(block)
                progress(body.tell())
            source.check_unchanged()

    def _read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        try:
            with (self._folder / key).open("rb") as file:
                file.seek(offset)
                return file.read(size_bytes)
        except FileNotFoundError:
            return None

    def _download(self, key: str, file: BinaryIO, size_bytes: int) -> Iterator[int]:
        for offset in range(0, size_bytes, limits.STORE_BLOCK_BYTES):
            block = self._read(key, offset, limits.STORE_BLOCK_BYTES)
            if block is None:
                raise UnknownBlob(f"{key} was deleted while it was being read")
            file.write(block)
            file.flush()
            yield offset + len(block)

    def _entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        files = (path for path in (self._folder / prefix.rpartition("/")[0]).rglob("*") if path.is_file())
        kept = ((str(path.relative_to(self._folder)), path) for path in files if not path.name.endswith(".partial"))
        for key, path in sorted(item for item in kept if item[0].startswith(prefix)):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield key, found.st_size, found.st_mtime

    def _stat(self, key: str) -> tuple[int, float] | None:
        try:
            found = (self._folder / key).stat()
        except FileNotFoundError:
            return None
        return found.st_size, found.st_mtime

    def _delete(self, key: str) -> None:
        (self._folder / key).unlink(missing_ok=True)
