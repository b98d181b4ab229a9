"""The artifact store as its users see it: content-addressed blobs, manifests over them, references beside them.

    blobs/sha256/ab/cdef...       bytes, named by their digest; written once, verified on every full read
    manifests/sha256/ab/cdef...   canonical manifests; written last, so a stored manifest has all its blobs
    refs/<name>                   a digest; the one kind of object that may be overwritten
    touched/<key>                 nothing; its time says when a blob or manifest that was there was stored again
    doomed/<key>                  nothing; a clean-up is about to delete the object

Human names live in the catalogue. Everything here is synchronous and thread-safe: call it through `asyncio.to_thread`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smeltkit import limits
from smeltkit.errors import BadManifest, BadName
from smeltkit.ids import check_digest, is_digest
from smeltkit.manifest import Manifest, check_path

Progress = Callable[[int], None]
"""Called with the bytes done so far, never from two threads at a time."""

BLOBS, MANIFESTS, REFS = "blobs", "manifests", "refs"
TOUCHED, DOOMED = "touched", "doomed"


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """A blob, manifest or reference as the store holds it."""

    key: str
    size_bytes: int
    modified_s: float
    """When it was written, by the store's clock in Unix time."""


class Store(Protocol):
    """Where artifacts live. Every method may raise StoreUnavailable, which a later attempt may cure."""

    def put_bytes(self, data: bytes) -> str:
        """Stores `data` unless it is there already; its digest."""

    def put_file(self, path: Path, *, progress: Progress | None = None) -> tuple[str, int]:
        """Stores a file unless it is there already; digest and size in bytes. FileChanged if it changes meanwhile."""

    def get_bytes(self, digest: str, *, max_bytes: int = limits.JSON_FILE_MAX_BYTES) -> bytes:
        """The verified blob; UnknownBlob, DigestMismatch, or BadFile if it has more than `max_bytes`."""

    def fetch(self, digest: str, path: Path, *, progress: Progress | None = None) -> None:
        """Writes the verified blob to `path`, whole or not at all; UnknownBlob, DigestMismatch, DiskFull."""

    def read_range(self, digest: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end. Not verified: a digest covers only the whole."""

    def size(self, digest: str) -> int | None:
        """Size of the blob in bytes, None if it is not stored."""

    def put_manifest(self, manifest: Manifest) -> str:
        """Stores the manifest, its digest; UnknownBlob names a layer that is not stored or has another size."""

    def get_manifest(self, digest: str) -> Manifest:
        """The verified manifest; UnknownArtifact."""

    def has_manifest(self, digest: str) -> bool:
        """Whether an artifact of this digest is stored."""

    def put_ref(self, name: str, digest: str) -> None:
        """Points `refs/<name>` at `digest`, replacing what was there."""

    def get_ref(self, name: str) -> str | None:
        """The digest `refs/<name>` points at, None if there is no such reference."""

    def list_refs(self, prefix: str = "") -> Iterator[str]:
        """Names of the references that start with `prefix`, sorted."""

    def list_blobs(self) -> Iterator[str]:
        """Digests of all blobs, sorted."""

    def list_manifests(self, digits: str = "") -> Iterator[str]:
        """Digests of all manifests, or of those whose hex digits begin with `digits` (two or more), sorted."""

    def delete_blob(self, digest: str) -> None:
        """Deletes a blob; nothing happens if it is not there. For garbage collection and repair only."""


@dataclass(frozen=True, kw_only=True)
class PartUrl:
    """One part of an upload and the URL that takes it by HTTP PUT; sizes in bytes."""

    number: int
    url: str
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class UploadPlan:
    """What a client still has to send; nothing if `is_stored`. `present` maps part numbers to ETags."""

    is_stored: bool
    upload_id: str = ""
    parts: tuple[PartUrl, ...] = ()
    present: tuple[tuple[int, str], ...] = ()


class Presigner(Protocol):
    """Lets clients without credentials move blobs themselves, by URLs that end after an hour."""

    def presign_download(self, digest: str) -> str:
        """A URL that reads the blob; UnknownBlob."""

    def begin_upload(self, digest: str, size_bytes: int) -> UploadPlan:
        """Starts or resumes the upload of a blob."""

    def complete_upload(self, digest: str, size_bytes: int, upload_id: str, parts: Sequence[tuple[int, str]]) -> None:
        """Joins the parts and reads the blob back; one with another digest is deleted again (DigestMismatch)."""


def blob_key(digest: str) -> str:
    """Key of a blob: `sha256:abcdef...` is `blobs/sha256/ab/cdef...`."""
    return _key(BLOBS, digest)


def manifest_key(digest: str) -> str:
    """Key of a manifest."""
    return _key(MANIFESTS, digest)


def ref_key(name: str) -> str:
    """Key of a reference; BadName unless the name is a relative path of at most 512 printable characters."""
    try:
        check_path(name)
    except BadManifest as error:
        raise BadName(f"reference {name!r} is no relative path; write names such as probes/<digest>") from error
    if len(name) > 512 or not name.isascii() or not name.isprintable():
        raise BadName(f"reference {name[:80]!r} must have at most 512 printable ASCII characters")
    return f"{REFS}/{name}"


def digest_of_key(key: str) -> str | None:
    """The digest a blob or manifest key stands for, None for any other key."""
    parts = key.split("/")
    digest = f"sha256:{''.join(parts[2:])}" if len(parts) == 4 and len(parts[2]) == 2 else ""
    return digest if is_digest(digest) else None


def _key(kind: str, digest: str) -> str:
    algorithm, _, text = check_digest(digest).partition(":")
    return f"{kind}/{algorithm}/{text[:2]}/{text[2:]}"
