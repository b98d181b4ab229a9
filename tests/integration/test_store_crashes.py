"""After a crash, a full disk or a store that is away: nothing half-written, and the work goes on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import pytest

from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.s3 import S3Store
from smeltkit.blobs.source import crc32_text
from smeltkit.errors import DigestMismatch, FileChanged, StoreDenied, StoreUnavailable, UnknownBlob
from smeltkit.ids import digest_bytes
from smeltkit.limits import MIB
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest
from smeltkit.testing.s3 import S3Server, fresh_store, s3_server

PART_BYTES = 5 * MIB
PROGRAM = """
import json, pathlib, resource, sys
from smeltkit.blobs.local import LocalStore
from smeltkit.blobs.s3 import S3Store
from smeltkit.blobs.source import crc32_text
from smeltkit.config import PlatformConfig
from smeltkit.errors import DiskFull
what = json.loads(sys.argv[1])
path = pathlib.Path(what["path"])
store = LocalStore(pathlib.Path(what["folder"])) if "folder" in what else S3Store(
    PlatformConfig(**what["config"]), state_folder=pathlib.Path(what["states"]), part_bytes=what["part_bytes"])
if "file_max_bytes" in what:
    resource.setrlimit(resource.RLIMIT_FSIZE, (what["file_max_bytes"],) * 2)
try:
    store.fetch(what["digest"], path) if "digest" in what else store.put_file(path)
except DiskFull as error:
    print("DISK_FULL", error)
"""


def run(what: dict[str, object]) -> subprocess.Popen[bytes]:
    """Another process that stores or fetches one file."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(what, default=str)], stdout=subprocess.PIPE)


def big_file(path: Path, parts: int) -> str:
    """Writes `parts` different parts; the digest of the whole."""
    path.write_bytes(b"".join(bytes([65 + part]) * PART_BYTES for part in range(parts)))
    return digest_bytes(path.read_bytes())


@pytest.fixture(params=["s3", "second_s3"])
def parts_store(request: pytest.FixtureRequest, tmp_path: Path) -> S3Store:
    """A store on each of two servers (R-125) that sends files in parts of 5 MiB."""
    server: S3Server = request.getfixturevalue(request.param)
    return fresh_store(server, tmp_path / "uploads", part_bytes=PART_BYTES)


def count_sends(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that `store` sends from now on."""
    sent: list[int] = []
    send = store._bucket.send

    def counted(key: str, upload_id: str, number: int, *rest: object) -> str:
        sent.append(number)
        return send(key, upload_id, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store._bucket, "send", counted)
    return sent


def test_upload_killed_in_the_middle_goes_on_with_what_is_missing(
    parts_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between two parts: nothing is visible, and the next try sends only the rest."""
    digest = big_file(tmp_path / "file", 24)
    child = run(
        {
            "path": tmp_path / "file",
            "config": asdict(parts_store.config),
            "states": tmp_path / "uploads",
            "part_bytes": PART_BYTES,
        }
    )
    arrived = 0
    while arrived < 6:
        assert child.poll() is None, "the upload ended before it could be killed"
        for state in (tmp_path / "uploads").glob("*.json"):
            arrived = len(json.loads(state.read_text())["parts"])
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (state,) = (tmp_path / "uploads").glob("*.json")
    arrived = len(json.loads(state.read_text())["parts"])
    assert parts_store.size(digest) is None
    sent = count_sends(parts_store, monkeypatch)
    parts_store.put_file(tmp_path / "file")
    assert len(sent) == 24 - arrived
    parts_store.fetch(digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    assert list((tmp_path / "uploads").glob("*.json")) == []


def test_part_altered_on_its_way_is_refused_by_the_server(store: S3Store) -> None:
    """Each put carries a CRC-32, which SeaweedFS compares with what arrived."""
    with pytest.raises(FileChanged, match="not those that were hashed"):
        store._bucket.put("blobs/x", b"arrived", 7, crc32_text(zlib.crc32(b"sent")))
    assert list(store._keys("blobs/")) == []


def test_stored_file_is_not_sent_again(parts_store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same digest and size: no part travels."""
    big_file(tmp_path / "file", 3)
    parts_store.put_file(tmp_path / "file")
    sent = count_sends(parts_store, monkeypatch)
    parts_store.put_file(tmp_path / "file")
    assert sent == []


def test_download_killed_in_the_middle_leaves_no_file_under_its_name(parts_store: S3Store, tmp_path: Path) -> None:
    """Only a whole, verified file gets the name."""
    digest = big_file(tmp_path / "file", 20)
    parts_store.put_file(tmp_path / "file")
    child = run(
        {
            "path": tmp_path / "out" / "target",
            "config": asdict(parts_store.config),
            "digest": digest,
            "states": tmp_path / "uploads",
            "part_bytes": PART_BYTES,
        }
    )
    while not list((tmp_path / "out").glob(".target.*.partial")):
        assert child.poll() is None, "the download ended before it could be killed"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (tmp_path / "out" / "target").exists()


def test_full_disk_while_fetching_is_told_and_leaves_nothing(parts_store: S3Store, tmp_path: Path) -> None:
    """The process may write files of 7 MiB only; the blob has 10."""
    digest = big_file(tmp_path / "file", 2)
    parts_store.put_file(tmp_path / "file")
    child = run(
        {
            "path": tmp_path / "out" / "target",
            "config": asdict(parts_store.config),
            "digest": digest,
            "states": tmp_path / "uploads",
            "part_bytes": PART_BYTES,
            "file_max_bytes": 7 * MIB,
        }
    )
    output, _ = child.communicate()
    assert output.startswith(b"DISK_FULL no space is left")
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_while_storing_in_a_folder_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """The folder store behaves the same."""
    big_file(tmp_path / "file", 2)
    child = run({"path": tmp_path / "file", "folder": tmp_path / "store", "file_max_bytes": 7 * MIB})
    output, _ = child.communicate()
    assert output.startswith(b"DISK_FULL no space is left")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_objects_survive_a_crash_of_the_server(tmp_path: Path) -> None:
    """StoreUnavailable meanwhile, the same bytes afterwards. R-129: what the node has cached needs no server."""
    with s3_server() as server:
        store = fresh_store(server, tmp_path / "uploads")
        digest = store.put_bytes(b"kept")
        manifest = Manifest(
            artifact_type=REPORT_TYPE,
            layers=(Descriptor(media_type="text/plain", digest=digest, size_bytes=4, path="file"),),
        )
        store.put_manifest(manifest)
        cache = NodeCache(tmp_path / "cache", store, MIB)
        with cache.materialize(manifest):
            pass
        server.kill()
        with pytest.raises(StoreUnavailable, match="try again later"):
            store.get_bytes(digest)
        with cache.materialize(manifest) as folder:
            assert (folder / "file").read_bytes() == b"kept"
        server.start()
        assert store.get_bytes(digest) == b"kept"
        assert store.get_manifest(manifest.digest) == manifest


def test_wrong_credentials_are_named(s3: S3Server) -> None:
    """Not mistaken for a missing object; no retry can help."""
    for wrong in (replace(s3.config, s3_secret_key="0" * 40), replace(s3.config, s3_access_key="nobody")):
        with pytest.raises(StoreDenied, match="SMELT_PLATFORM_S3_ACCESS_KEY"):
            S3Store(wrong).put_bytes(b"x")


def test_missing_bucket_is_named(s3: S3Server) -> None:
    """It is a matter of setting up, not a missing blob."""
    store = S3Store(replace(s3.config, s3_bucket="never-made"))
    with pytest.raises(StoreUnavailable, match="no bucket .*never-made"):
        store.get_bytes("sha256:" + "0" * 64)


def test_client_without_credentials_uploads_and_downloads(parts_store: S3Store, tmp_path: Path) -> None:
    """Presigned URLs alone; an interrupted upload is taken up by whoever asks next."""
    digest = big_file(tmp_path / "file", 3)
    size = (tmp_path / "file").stat().st_size
    data = (tmp_path / "file").read_bytes()
    plan = parts_store.begin_upload(digest, size)
    assert [part.number for part in plan.parts] == [1, 2, 3]
    first = plan.parts[0]
    httpx.put(first.url, content=data[first.offset_bytes : first.offset_bytes + first.size_bytes]).raise_for_status()
    again = parts_store.begin_upload(digest, size)
    assert (again.upload_id, [part.number for part in again.parts]) == (plan.upload_id, [2, 3])
    tags = dict(again.present)
    for part in again.parts:
        answer = httpx.put(part.url, content=data[part.offset_bytes : part.offset_bytes + part.size_bytes])
        tags[part.number] = answer.raise_for_status().headers["etag"].strip('"')
    parts_store.complete_upload(digest, size, plan.upload_id, sorted(tags.items()))
    assert httpx.get(parts_store.presign_download(digest)).raise_for_status().content == data
    assert parts_store.begin_upload(digest, size).is_stored


def test_upload_of_other_bytes_than_announced_is_not_kept(parts_store: S3Store) -> None:
    """The stored bytes are read back; a client cannot place bytes under a digest that is not theirs."""
    digest = digest_bytes(b"announced")
    plan = parts_store.begin_upload(digest, 9)
    answer = httpx.put(plan.parts[0].url, content=b"different")
    with pytest.raises(DigestMismatch, match="nothing was kept"):
        parts_store.complete_upload(digest, 9, plan.upload_id, [(1, answer.headers["etag"].strip('"'))])
    assert parts_store.size(digest) is None


def test_unfinished_uploads_are_given_up_after_their_time(store: S3Store) -> None:
    """A week by default; parts take room that nobody sees. (rclone lists unfinished uploads by their full key only.)"""
    digest = digest_bytes(b"never sent")
    plan = store.begin_upload(digest, 10)
    assert store.abort_uploads() == 0
    assert store.abort_uploads(older_than_s=-60) == 1
    assert store.begin_upload(digest, 10).upload_id != plan.upload_id


def test_empty_blob_needs_no_upload(parts_store: S3Store) -> None:
    """Zero bytes are known from their digest."""
    assert parts_store.begin_upload(digest_bytes(b""), 0).is_stored
    assert parts_store.get_bytes(digest_bytes(b"")) == b""


def test_url_for_an_unknown_blob_is_refused(parts_store: S3Store) -> None:
    """A URL that leads nowhere is not handed out."""
    with pytest.raises(UnknownBlob):
        parts_store.presign_download("sha256:" + "0" * 64)
