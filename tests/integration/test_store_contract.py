"""What every store promises, held by each back end: a folder, `weed mini`, and a second S3 server of other make."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from smeltkit.blobs.local import LocalStore
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.store import blob_key, manifest_key
from smeltkit.errors import (
    BadDigest,
    BadFile,
    BadManifest,
    BadName,
    BadRequest,
    DigestMismatch,
    FileChanged,
    UnknownArtifact,
    UnknownBlob,
    UnknownSource,
)
from smeltkit.ids import digest_bytes
from smeltkit.limits import MIB
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest
from smeltkit.testing.s3 import S3Server, fresh_store

ABSENT = "sha256:" + "0" * 64
PART_BYTES = 5 * MIB


@pytest.fixture(params=["folder", "seaweedfs", "rclone"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A fresh store of each kind; the S3 ones split files above 5 MiB."""
    if request.param == "folder":
        return LocalStore(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3" if request.param == "seaweedfs" else "second_s3")
    return fresh_store(server, tmp_path / "uploads", part_bytes=PART_BYTES)


def manifest_of(store: ObjectStore, **files: bytes) -> Manifest:
    """A report of these files, whose blobs are stored."""
    layers = tuple(
        Descriptor(media_type="text/plain", digest=store.put_bytes(data), size_bytes=len(data), path=path)
        for path, data in files.items()
    )
    return Manifest(artifact_type=REPORT_TYPE, config={"score": 1}, layers=layers)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 300], ids=["empty", "one byte", "75 KiB"])
def test_bytes_come_back_under_their_digest(any_store: ObjectStore, data: bytes) -> None:
    """R-125: the same promise on every back end."""
    digest = any_store.put_bytes(data)
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert any_store.get_bytes(digest) == data
    assert any_store.size(digest) == len(data)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES - 7])
def test_file_comes_back_as_it_was(any_store: ObjectStore, tmp_path: Path, size: int) -> None:
    """Below, at and above the size from which files are sent in parts. R-125."""
    data = (hashlib.sha256(b"seed").digest() * (size // 32 + 1))[:size]
    source, target = tmp_path / "source.bin", tmp_path / "deep" / "target.bin"
    source.write_bytes(data)
    stored, fetched = [-1], [-1]
    digest, size_bytes = any_store.put_file(source, progress=stored.append)
    any_store.fetch(digest, target, progress=fetched.append)
    assert (digest, size_bytes) == (digest_bytes(data), size)
    assert target.read_bytes() == data
    assert stored[-1] == size and stored == sorted(stored)
    assert size == 0 or fetched[-1] == size and fetched == sorted(fetched)


def test_storing_twice_keeps_one_blob(any_store: ObjectStore, tmp_path: Path) -> None:
    """The same bytes as a value and as a file are one object."""
    (tmp_path / "file").write_bytes(b"same")
    assert any_store.put_bytes(b"same") == any_store.put_file(tmp_path / "file")[0]
    assert list(any_store.list_blobs()) == [digest_bytes(b"same")]


def test_ranges_are_cut_at_the_end(any_store: ObjectStore) -> None:
    """A range beyond the end is shorter or empty, never an error."""
    digest = any_store.put_bytes(b"0123456789")
    assert any_store.read_range(digest, 2, 3) == b"234"
    assert any_store.read_range(digest, 8, 100) == b"89"
    assert any_store.read_range(digest, 10, 1) == b""
    assert any_store.read_range(digest, 99, 1) == b""
    assert any_store.read_range(digest, 0, 0) == b""
    with pytest.raises(BadRequest):
        any_store.read_range(digest, -1, 1)


def test_unknown_digest_is_named(any_store: ObjectStore, tmp_path: Path) -> None:
    """Every way of reading what is not there says which digest."""
    assert any_store.size(ABSENT) is None
    assert not any_store.has_manifest(ABSENT)
    for read in (
        any_store.get_bytes,
        lambda digest: any_store.read_range(digest, 0, 1),
        lambda digest: any_store.fetch(digest, tmp_path / "out"),
    ):
        with pytest.raises(UnknownBlob, match=ABSENT):
            read(ABSENT)
    with pytest.raises(UnknownArtifact, match=ABSENT):
        any_store.get_manifest(ABSENT)
    assert list(tmp_path.glob("*out*")) == []


def test_malformed_digest_is_refused(any_store: ObjectStore) -> None:
    """No path can be smuggled in as a digest."""
    for text in ("", "sha256:..", "md5:" + "0" * 32, "sha256:" + "A" * 64):
        with pytest.raises(BadDigest):
            any_store.size(text)


def test_damaged_object_is_never_returned(any_store: ObjectStore, tmp_path: Path) -> None:
    """R-013: reading verifies the digest, and a failed fetch leaves no file."""
    digest = any_store.put_bytes(b"what was stored")
    any_store._write(blob_key(digest), b"what was altered")
    with pytest.raises(DigestMismatch, match=digest):
        any_store.get_bytes(digest)
    with pytest.raises(DigestMismatch, match=digest):
        any_store.fetch(digest, tmp_path / "out" / "file")
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_manifest_is_never_returned(any_store: ObjectStore) -> None:
    """R-013."""
    digest = any_store.put_manifest(manifest_of(any_store, a=b"1"))
    any_store._write(manifest_key(digest), b"{}")
    with pytest.raises(DigestMismatch):
        any_store.get_manifest(digest)


def test_blob_larger_than_asked_for_is_refused(any_store: ObjectStore) -> None:
    """Reading into memory has a bound."""
    digest = any_store.put_bytes(b"12345")
    assert any_store.get_bytes(digest, max_bytes=5) == b"12345"
    with pytest.raises(BadFile, match="more than 4 bytes"):
        any_store.get_bytes(digest, max_bytes=4)


def test_manifest_comes_back_equal(any_store: ObjectStore) -> None:
    """Its digest is its identity."""
    manifest = manifest_of(any_store, a=b"1", b=b"22")
    digest = any_store.put_manifest(manifest)
    assert digest == manifest.digest
    assert any_store.has_manifest(digest)
    assert any_store.get_manifest(digest) == manifest
    assert list(any_store.list_manifests()) == [digest]
    digits = digest.removeprefix("sha256:")
    assert list(any_store.list_manifests(digits[:7])) == [digest]
    assert list(any_store.list_manifests(digits[:6] + ("1" if digits[6] == "0" else "0"))) == []


def test_manifest_needs_all_its_blobs(any_store: ObjectStore) -> None:
    """A manifest is written last; one with a missing or shorter blob is refused and names the file."""
    for size, stored in ((5, None), (5, b"1234")):
        digest = any_store.put_bytes(stored) if stored else ABSENT
        layer = Descriptor(media_type="text/plain", digest=digest, size_bytes=size, path="weights.bin")
        with pytest.raises(UnknownBlob, match="weights.bin"):
            any_store.put_manifest(Manifest(artifact_type=REPORT_TYPE, layers=(layer,)))
    assert list(any_store.list_manifests()) == []


def test_stored_json_that_is_no_manifest_is_refused(any_store: ObjectStore) -> None:
    """Even under its right digest."""
    any_store._write(manifest_key(digest_bytes(b"[]")), b"[]")
    with pytest.raises(BadManifest):
        any_store.get_manifest(digest_bytes(b"[]"))


def test_reference_can_be_moved(any_store: ObjectStore) -> None:
    """References are the one thing that is overwritten."""
    first, second = digest_bytes(b"1"), digest_bytes(b"2")
    assert any_store.get_ref("probes/abc/engine") is None
    any_store.put_ref("probes/abc/engine", first)
    any_store.put_ref("probes/abc/engine", second)
    any_store.put_ref("probes/abd/engine", first)
    assert any_store.get_ref("probes/abc/engine") == second
    assert list(any_store.list_refs("probes/ab")) == ["probes/abc/engine", "probes/abd/engine"]
    assert list(any_store.list_refs("probes/abc/")) == ["probes/abc/engine"]
    assert list(any_store.list_refs("other/")) == []


@pytest.mark.parametrize("name", ["", "../blobs", "/etc", "a//b", "a\0b", "a\nb", "x" * 513])
def test_reference_outside_its_folder_is_refused(any_store: ObjectStore, name: str) -> None:
    """Names from outside cannot reach other keys."""
    with pytest.raises(BadName):
        any_store.put_ref(name, ABSENT)


def test_deleted_blob_is_gone_and_deleting_again_is_fine(any_store: ObjectStore) -> None:
    """Repair: delete, then store again."""
    digest = any_store.put_bytes(b"short-lived")
    any_store.delete_blob(digest)
    any_store.delete_blob(digest)
    assert any_store.size(digest) is None
    assert any_store.put_bytes(b"short-lived") == digest
    assert any_store.get_bytes(digest) == b"short-lived"


@pytest.mark.parametrize("size", [10, 2 * PART_BYTES])
def test_file_that_changes_while_it_is_stored_is_not_kept(
    any_store: ObjectStore, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is what was hashed, or nothing."""
    source = tmp_path / "source"
    source.write_bytes(b"a" * size)
    upload = any_store._upload

    def write_then_upload(*arguments: object) -> None:
        source.write_bytes(b"b" * size)
        upload(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(any_store, "_upload", write_then_upload)
    with pytest.raises(FileChanged):
        any_store.put_file(source)
    assert list(any_store.list_blobs()) == []


def test_folder_cannot_be_stored(any_store: ObjectStore, tmp_path: Path) -> None:
    """Nor a path that does not exist."""
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UnknownSource, match="no file"):
            any_store.put_file(path)
