"""Clean-up of the store: what is reachable or young stays whatever goes on meanwhile, and the rest goes."""

from __future__ import annotations

import math
import random
import threading
import time
from pathlib import Path

import pytest
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.blobs.garbage import cut_off, delete_garbage, digests_in, find_garbage
from smeltkit.blobs.local import LocalStore
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.store import blob_key
from smeltkit.bus import Bus
from smeltkit.catalog import Catalog
from smeltkit.errors import BadRequest
from smeltkit.ids import digest_bytes
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.roots import gather_roots
from smeltkit.manifest import BUNDLE_TYPE, PROBE_TYPE, REPORT_TYPE, Descriptor, Manifest
from smeltkit.testing.s3 import fresh_store

CLOCK_S = 1.0
"""Resolution of an S3 server's times."""


@pytest.fixture(params=["folder", "seaweedfs"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A fresh store of each kind."""
    if request.param == "folder":
        return LocalStore(tmp_path / "store")
    return fresh_store(request.getfixturevalue("s3"), tmp_path / "uploads")


@pytest.fixture(autouse=True)
def touched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored again is young again even if it was young."""
    monkeypatch.setattr(limits, "STORE_TOUCH_AFTER_S", -1.0)


def put(store: ObjectStore, kind: str, *files: bytes, subject: str = "", **config: str) -> str:
    """A stored artifact of these files."""
    layers = tuple(
        Descriptor(media_type="x", digest=store.put_bytes(data), size_bytes=len(data), path=f"file-{index}")
        for index, data in enumerate(files)
    )
    return store.put_manifest(Manifest(artifact_type=kind, config=config, layers=layers, subject=subject))


def grow_old(store: ObjectStore) -> float:
    """Waits until what is stored is older than the cut-off that is returned."""
    if isinstance(store, LocalStore):
        time.sleep(0.1)  # times of files come from the kernel's coarse clock, which may be 10 ms behind
        return time.time() - 0.05
    time.sleep(CLOCK_S + 0.1)
    return float(math.floor(time.time()))


def test_only_what_nothing_leads_to_is_found_and_nothing_is_deleted_by_looking(any_store: ObjectStore) -> None:
    """R-112: names, jobs, lineage, reports about what is kept, and their files stay."""
    source = put(any_store, BUNDLE_TYPE, b"source")
    named = put(any_store, BUNDLE_TYPE, b"weights", b"shared", source=source)
    report = put(any_store, REPORT_TYPE, b"samples", subject=named)
    for bundle in (named, lost := put(any_store, BUNDLE_TYPE, b"lost", b"shared")):
        probe = put(any_store, PROBE_TYPE, subject=bundle, of=bundle[:9])
        any_store.put_ref(f"probes/{bundle[7:]}/engine", probe)
    put(any_store, REPORT_TYPE, b"samples of lost", subject=lost)
    any_store.put_ref("evaluations/key/1", any_store.put_bytes(b"batch"))
    orphan = any_store.put_bytes(b"orphan")
    garbage = find_garbage(any_store, {named}, grow_old(any_store))
    assert garbage.size_bytes > 0
    before = [item.key for kind in ("blobs", "manifests", "refs") for item in any_store.list_objects(kind)]
    assert [item.key for kind in ("blobs", "manifests", "refs") for item in any_store.list_objects(kind)] == before
    deleted = {item.key for item in delete_garbage(any_store, garbage)}
    assert deleted == {item.key for item in garbage.objects}
    assert set(any_store.list_blobs()) == {
        digest_bytes(data) for data in (b"source", b"weights", b"shared", b"samples", b"batch")
    }
    assert orphan not in set(any_store.list_blobs())
    assert set(any_store.list_manifests()) >= {source, named, report} and lost not in set(any_store.list_manifests())
    assert list(any_store.list_refs("probes/")) == [f"probes/{named[7:]}/engine"]


def test_what_is_young_or_was_stored_again_stays(any_store: ObjectStore) -> None:
    """R-112: an upload under way leads to nothing yet, and may find that some of its files are there already."""
    for data in (b"again", b"old"):
        any_store.put_bytes(data)
    cut_off_s = grow_old(any_store)
    again, young = any_store.put_bytes(b"again"), any_store.put_bytes(b"young")
    garbage = find_garbage(any_store, set(), cut_off_s)
    assert [item.size_bytes for item in garbage.objects] == [3]
    delete_garbage(any_store, garbage)
    assert set(any_store.list_blobs()) == {again, young}


def test_what_is_stored_again_between_look_and_deletion_stays(any_store: ObjectStore) -> None:
    """R-112: its age is read again right before."""
    digest = any_store.put_bytes(b"wanted again")
    garbage = find_garbage(any_store, set(), grow_old(any_store))
    assert len(garbage.objects) == 1
    any_store.put_bytes(b"wanted again")
    assert delete_garbage(any_store, garbage) == []
    assert any_store.get_bytes(digest) == b"wanted again"


def test_a_writer_and_a_clean_up_that_meet_see_each_other(tmp_path: Path) -> None:
    """R-112: the object is stored again at the worst moment, right after the clean-up looked at its age."""

    class Interrupted(LocalStore):
        def _used_s(self, key: str) -> float | None:
            used_s = super()._used_s(key)
            writer.start()
            while not (tmp_path / "touched" / key).exists():
                time.sleep(0.001)
            return used_s

    store = Interrupted(tmp_path)
    digest = store.put_bytes(b"data")
    garbage = find_garbage(store, set(), grow_old(store))
    made: list[str] = []
    writer = threading.Thread(target=lambda: made.append(put(LocalStore(tmp_path), BUNDLE_TYPE, b"data")))
    delete_garbage(store, garbage)
    writer.join()
    assert store.get_manifest(made[0]).layers[0].digest == digest
    assert store.get_bytes(digest) == b"data"


def test_a_clean_up_that_died_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-112: its announcement is too old to be followed by a deletion."""
    monkeypatch.setattr(limits, "GARBAGE_DOOM_MAX_S", 0.5)
    store = LocalStore(tmp_path)
    key = blob_key(store.put_bytes(b"data"))
    (tmp_path / "doomed" / key).parent.mkdir(parents=True)
    (tmp_path / "doomed" / key).touch()
    assert store.get_bytes(store.put_bytes(b"data")) == b"data"


@pytest.mark.parametrize("server", ["s3", "second_s3"])
def test_uploads_beside_a_clean_up_lose_nothing(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """R-112, R-125: three writers store old and new files in new artifacts while clean-ups follow each other."""
    any_store, draw = fresh_store(request.getfixturevalue(server), tmp_path / "uploads"), random.Random(server)
    old = [f"old {index}".encode() for index in range(30)]
    kept = put(any_store, BUNDLE_TYPE, *old[:5])
    for data in old[5:]:
        any_store.put_bytes(data)
    cut_off_s = grow_old(any_store)
    stored: list[str] = []
    errors: list[Exception] = []
    plans = [[(draw.sample(old, 3), f"new {writer} {number}".encode()) for number in range(6)] for writer in range(3)]

    def write(plan: list[tuple[list[bytes], bytes]]) -> None:
        try:
            for reused, fresh in plan:
                stored.append(put(any_store, BUNDLE_TYPE, *reused, fresh))
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(plan,)) for plan in plans]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        delete_garbage(any_store, find_garbage(any_store, {kept}, cut_off_s))
    for writer in writers:
        writer.join()
    delete_garbage(any_store, find_garbage(any_store, {kept}, cut_off_s))
    assert not errors and len(stored) == 18
    for digest in (kept, *stored):
        for layer in any_store.get_manifest(digest).layers:
            assert len(any_store.get_bytes(layer.digest)) == layer.size_bytes
    wanted = {layer.digest for digest in (kept, *stored) for layer in any_store.get_manifest(digest).layers}
    assert set(any_store.list_blobs()) == wanted


async def test_names_and_jobs_are_the_roots_and_a_job_at_work_keeps_what_came_after_it(bus: Bus) -> None:
    """R-112: also the digests in a job's request, and in a record that does not parse."""
    named, asked, broken = (digest_bytes(name) for name in (b"named", b"asked", b"broken"))
    await Catalog(bus).set("garbage-test", named, BUNDLE_TYPE, 1)
    await bus.bucket("smelt_catalog").create("broken", b"\xff\xff" + broken.encode())
    request = job_pb2.Refusal(reason=asked)
    began = time.time()
    job = await JobLedger(bus).start(service="trainer", kind="train", request=request, request_id="garbage-test")
    roots = await gather_roots(bus)
    assert {named, asked, broken} <= roots.digests
    assert any(abs(begun - began) < 5 for begun in roots.begun_s)
    await JobLedger(bus).cancel(job.id)


def test_the_cut_off_is_the_least_age_or_the_oldest_job() -> None:
    """R-112."""
    day = 24 * 3600.0
    assert cut_off(100 * day, 7 * day, []) == 93 * day
    assert cut_off(100 * day, 7 * day, [90 * day, 99 * day]) == 90 * day
    assert cut_off(100 * day, 7 * day, [99 * day]) == 93 * day
    with pytest.raises(BadRequest, match="must be at least"):
        cut_off(100 * day, day, [])


def test_digests_are_found_in_any_bytes() -> None:
    digest = digest_bytes(b"x")
    assert digests_in(b"\x00\xff" + digest.encode() + b"\x12a") == {digest}
    assert digests_in(b"sha256:short") == set()
