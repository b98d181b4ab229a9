"""What every store does alike, over seven primitives on keys: digests, verification, manifests, references."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from smeltkit import limits
from smeltkit.blobs.source import Source
from smeltkit.blobs.store import (
    BLOBS,
    DOOMED,
    MANIFESTS,
    REFS,
    TOUCHED,
    Progress,
    StoredObject,
    blob_key,
    digest_of_key,
    manifest_key,
    ref_key,
)
from smeltkit.errors import (
    BadFile,
    BadRequest,
    DigestMismatch,
    DiskFull,
    StoreUnavailable,
    UnknownArtifact,
    UnknownBlob,
)
from smeltkit.ids import check_digest, digest_bytes
from smeltkit.manifest import Manifest

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ObjectStore(ABC):
    """Implements `Store`; a back end adds the primitives. Writes must be atomic: a key is whole or absent."""

    @abstractmethod
    def _write(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def _upload(self, key: str, source: Source, progress: Progress) -> None:
        """Stores the file under `key`; FileChanged, and nothing stored, if it was written since it was hashed."""

    @abstractmethod
    def _read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        """Up to `size_bytes` from `offset`, None if there is no such key."""

    @abstractmethod
    def _download(self, key: str, file: BinaryIO, size_bytes: int) -> Iterator[int]:
        """Writes the object to `file` and yields how many bytes from its beginning are there, growing to the size."""

    @abstractmethod
    def _stat(self, key: str) -> tuple[int, float] | None:
        """Size in bytes of the object, and Unix time of its writing by the store's clock; None if there is none."""

    @abstractmethod
    def _entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Key, size in bytes and Unix time of writing of all objects whose key starts with `prefix`, sorted by key."""

    @abstractmethod
    def _delete(self, key: str) -> None: ...

    def put_bytes(self, data: bytes) -> str:
        """See `Store.put_bytes`."""
        digest = digest_bytes(data)
        key = blob_key(digest)
        if not self._keep(key, len(data)):
            self._write(key, data)
        return digest

    def put_file(self, path: Path, *, progress: Progress | None = None) -> tuple[str, int]:
        """See `Store.put_file`."""
        report = progress or _ignore
        with Source.open(path) as source:
            key = blob_key(source.digest)
            if not self._keep(key, source.size_bytes):
                self._upload(key, source, report)
            report(source.size_bytes)
            return source.digest, source.size_bytes

    def get_bytes(self, digest: str, *, max_bytes: int = limits.JSON_FILE_MAX_BYTES) -> bytes:
        """See `Store.get_bytes`."""
        return self._verified(blob_key(digest), digest, max_bytes, UnknownBlob)

    def fetch(self, digest: str, path: Path, *, progress: Progress | None = None) -> None:
        """See `Store.fetch`."""
        report = progress or _ignore
        key = blob_key(digest)
        size_bytes = self._size(key)
        if size_bytes is None:
            raise UnknownBlob(f"blob {digest} is not stored")
        with new_file(path) as file:
            hasher, hashed_bytes = hashlib.sha256(), 0
            for done_bytes in self._download(key, file, size_bytes):
                while hashed_bytes < done_bytes:
                    block = os.pread(
                        file.fileno(), min(limits.STORE_BLOCK_BYTES, done_bytes - hashed_bytes), hashed_bytes
                    )
                    if not block:
                        raise _mismatch(digest, f"only {hashed_bytes} of {size_bytes} bytes arrived")
                    hasher.update(block)
                    hashed_bytes += len(block)
                report(done_bytes)
            found = f"sha256:{hasher.hexdigest()}"
            if found != digest:
                raise _mismatch(digest, f"its bytes have the digest {found}")

    def read_range(self, digest: str, offset: int, size: int) -> bytes:
        """See `Store.read_range`."""
        if offset < 0 or size < 0:
            raise BadRequest(f"range of {size} bytes from {offset}: both must be 0 or more")
        key = blob_key(digest)
        stored_bytes = self._size(key)
        if stored_bytes is None:
            raise UnknownBlob(f"blob {digest} is not stored")
        size = min(size, stored_bytes - offset)
        data = self._read(key, offset, size) if size > 0 else b""
        if data is None:
            raise UnknownBlob(f"blob {digest} is not stored")
        return data

    def size(self, digest: str) -> int | None:
        """See `Store.size`."""
        return self._size(blob_key(digest))

    def reread(self, digest: str) -> tuple[str, int]:
        """Digest and size in bytes of what is really stored as the blob `digest`, read whole; UnknownBlob."""
        hasher, done_bytes = hashlib.sha256(), 0
        while block := self.read_range(digest, done_bytes, limits.DOWNLOAD_RANGE_BYTES):
            hasher.update(block)
            done_bytes += len(block)
        return f"sha256:{hasher.hexdigest()}", done_bytes

    def put_manifest(self, manifest: Manifest) -> str:
        """See `Store.put_manifest`."""
        for layer in manifest.layers:
            if not self._keep(blob_key(layer.digest), layer.size_bytes):
                stored_bytes = self.size(layer.digest)
                what = "is not stored" if stored_bytes is None else f"is stored with {stored_bytes} bytes"
                raise UnknownBlob(
                    f"{layer.path}: blob {layer.digest} of {layer.size_bytes} bytes {what}; store it first"
                )
        data = manifest.to_bytes()
        if len(data) > limits.MANIFEST_MAX_BYTES:
            raise BadFile(f"manifest has {len(data)} bytes; at most {limits.MANIFEST_MAX_BYTES} are allowed")
        digest = digest_bytes(data)
        key = manifest_key(digest)
        if not self._keep(key, len(data)):
            self._write(key, data)
        return digest

    def get_manifest(self, digest: str) -> Manifest:
        """See `Store.get_manifest`."""
        data = self._verified(manifest_key(digest), digest, limits.MANIFEST_MAX_BYTES, UnknownArtifact)
        return Manifest.from_bytes(data)

    def has_manifest(self, digest: str) -> bool:
        """See `Store.has_manifest`."""
        return self._size(manifest_key(digest)) is not None

    def put_ref(self, name: str, digest: str) -> None:
        """See `Store.put_ref`."""
        self._write(ref_key(name), check_digest(digest).encode())

    def get_ref(self, name: str) -> str | None:
        """See `Store.get_ref`."""
        data = self._read(ref_key(name), 0, limits.REFERENCE_MAX_BYTES)
        return None if data is None else check_digest(data.decode("ascii", "replace"))

    def delete_ref(self, name: str) -> None:
        """Deletes a reference; nothing happens if it is not there."""
        self._delete(ref_key(name))

    def list_refs(self, prefix: str = "") -> Iterator[str]:
        """See `Store.list_refs`."""
        return (key.removeprefix(f"{REFS}/") for key in self._keys(f"{REFS}/{prefix}"))

    def list_blobs(self) -> Iterator[str]:
        """See `Store.list_blobs`."""
        return filter(None, map(digest_of_key, self._keys(f"{BLOBS}/sha256/")))

    def list_manifests(self, digits: str = "") -> Iterator[str]:
        """See `Store.list_manifests`."""
        begin = f"{digits[:2]}/{digits[2:]}" if digits else ""
        return filter(None, map(digest_of_key, self._keys(f"{MANIFESTS}/sha256/{begin}")))

    def delete_blob(self, digest: str) -> None:
        """See `Store.delete_blob`."""
        self._delete(blob_key(digest))

    def list_objects(self, kind: str) -> Iterator[StoredObject]:
        """Every object of a kind (BLOBS, MANIFESTS, REFS or TOUCHED) with its size and age, sorted by key."""
        for key, size_bytes, modified_s in self._entries(f"{kind}/"):
            yield StoredObject(key=key, size_bytes=size_bytes, modified_s=modified_s)

    def is_empty(self) -> bool:
        """Whether nothing at all lies where this store is."""
        return next(self._entries(""), None) is None

    def discard(self, key: str, cut_off_s: float) -> bool:
        """Deletes an object that was neither written nor stored again since `cut_off_s`; whether it did.

        It says so first (`doomed/<key>`), then looks at the object's age, then deletes; whoever stores it again makes
        it young first and then looks whether it is doomed. So one of the two sees the other, and nothing is lost.
        """
        doomed, began = f"{DOOMED}/{key}", time.monotonic()
        self._write(doomed, b"")
        used_s = self._used_s(key)
        is_old = used_s is not None and used_s < cut_off_s
        is_quick = time.monotonic() - began < limits.GARBAGE_DOOM_MAX_S
        if is_old and is_quick:
            self._delete(key)
            self._delete(f"{TOUCHED}/{key}")
        self._delete(doomed)
        return is_old and is_quick

    def _keep(self, key: str, size_bytes: int) -> bool:
        """Whether an object of that size is stored; then it is young now, and no clean-up at work deletes it.

        S3 keeps no time of use, so an old object gets a mark beside it. StoreUnavailable if a clean-up does not let go.
        """
        found = self._stat(key)
        if found is None or found[0] != size_bytes:
            return False
        if time.time() - found[1] < limits.STORE_TOUCH_AFTER_S:
            return True
        self._write(f"{TOUCHED}/{key}", b"")
        deadline = time.monotonic() + 2 * limits.GARBAGE_DOOM_MAX_S
        while (doom := self._stat(f"{DOOMED}/{key}")) is not None:
            if time.time() - doom[1] > 2 * limits.GARBAGE_DOOM_MAX_S:
                break
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"a clean-up does not let go of {key}; try again")
            time.sleep(limits.GARBAGE_POLL_S)
        return self._size(key) == size_bytes

    def _used_s(self, key: str) -> float | None:
        written, touched = self._stat(key), self._stat(f"{TOUCHED}/{key}")
        return None if written is None else max(written[1], touched[1] if touched else 0.0)

    def _size(self, key: str) -> int | None:
        found = self._stat(key)
        return None if found is None else found[0]

    def _keys(self, prefix: str) -> Iterator[str]:
        return (key for key, _, _ in self._entries(prefix))

    def _verified(self, key: str, digest: str, max_bytes: int, unknown: type[UnknownBlob | UnknownArtifact]) -> bytes:
        data = self._read(key, 0, max_bytes + 1)
        if data is None:
            raise unknown(f"{digest} is not stored")
        if len(data) > max_bytes:
            raise BadFile(f"{digest} has more than {max_bytes} bytes, too many to read at once; fetch it into a file")
        found = digest_bytes(data)
        if found != digest:
            raise _mismatch(digest, f"its bytes have the digest {found}")
        return data


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name when the block ends well and vanishes when not; DiskFull."""
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb+") as file:
            yield file
            file.flush()
        os.replace(partial, path)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"no space is left for {path}: {error.strerror}; free space and try again") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _mismatch(digest: str, found: str) -> DigestMismatch:
    return DigestMismatch(f"stored object {digest} is damaged: {found}; delete it and store the file again")


def _ignore(_: int) -> None:
    return None
