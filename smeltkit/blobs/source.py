"""A file on its way into a store: opened once, hashed once, and watched, so that what is stored is what was hashed."""

from __future__ import annotations

import base64
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import FileChanged, UnknownSource
from smeltkit.ids import digest_file


class FileSlice(io.RawIOBase):
    """A read-only range of an open file as an HTTP body; memory does not grow with it. FileChanged if it ends early."""

    def __init__(self, descriptor: int, offset_bytes: int, size_bytes: int) -> None:
        self._descriptor, self._offset_bytes, self.size_bytes = descriptor, offset_bytes, size_bytes
        self._position_bytes = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: a retry sends the range from its beginning."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to `offset` bytes from the range's beginning."""
        assert whence == os.SEEK_SET
        self._position_bytes = offset
        return offset

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position_bytes

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, the rest if negative."""
        rest_bytes = self.size_bytes - self._position_bytes
        size = rest_bytes if size < 0 else min(size, rest_bytes)
        data = os.pread(self._descriptor, size, self._offset_bytes + self._position_bytes)
        if size and not data:
            raise FileChanged("the file became shorter while it was being stored; store it again when it is complete")
        self._position_bytes += len(data)
        return data

    def crc32(self) -> str:
        """CRC-32 of the range as S3 writes it, base64 of four bytes; moves to the range's beginning."""
        checksum = 0
        self.seek(0)
        while block := self.read(limits.STORE_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
        self.seek(0)
        return crc32_text(checksum)


def crc32_text(checksum: int) -> str:
    """A CRC-32 as S3 writes it."""
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open file with the digest and size it had when it was read."""

    path: Path
    descriptor: int
    digest: str
    size_bytes: int
    identity: tuple[int, int]

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Source]:
        """Opens and hashes the file; UnknownSource if it is none."""
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UnknownSource(f"{path} is no file that can be stored") from error
        with file:
            identity = _identity(file.fileno())
            digest, size_bytes = digest_file(file)
            yield cls(path=path, descriptor=file.fileno(), digest=digest, size_bytes=size_bytes, identity=identity)

    def slice(self, offset_bytes: int, size_bytes: int) -> FileSlice:
        """A range of the file as an HTTP body."""
        return FileSlice(self.descriptor, offset_bytes, size_bytes)

    def check_unchanged(self) -> None:
        """FileChanged if the file was written since it was hashed."""
        if _identity(self.descriptor) != self.identity:
            raise FileChanged(f"{self.path} changed while it was being stored; store it again when it is complete")


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
