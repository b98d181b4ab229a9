"""Backup of a platform at work and restoration into an empty one, on real NATS and S3 servers."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from smelt.job.v1 import job_pb2

from smeltkit import backup
from smeltkit.blobs.below import StoreBelow
from smeltkit.blobs.local import LocalStore
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.s3 import S3Store
from smeltkit.blobs.store import blob_key
from smeltkit.bus.subjects import CATALOG_BUCKET, JOBS_BUCKET
from smeltkit.catalog import Catalog
from smeltkit.config import environment
from smeltkit.errors import BadFile, DigestMismatch, NotEmpty, UnknownSource
from smeltkit.jobs import model
from smeltkit.jobs.attempt import JobContext
from smeltkit.jobs.stages import StageCache
from smeltkit.manifest import REPORT_TYPE, Descriptor, Manifest
from smeltkit.testing.jobs import JobRig, job_rig
from smeltkit.testing.s3 import S3Server, fresh_store


@pytest.fixture
async def empty(s3: S3Server, tmp_path: Path) -> AsyncIterator[tuple[JobRig, S3Store]]:
    """Another platform: its own NATS with nothing but the topology, its own bucket."""
    async with job_rig() as made:
        yield made, fresh_store(s3, tmp_path / "uploads")


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Where the backup goes: a folder, or a prefix of a bucket of another make that holds something else."""
    if request.param == "folder":
        return LocalStore(tmp_path / "backup")
    shared = fresh_store(request.getfixturevalue("second_s3"), tmp_path / "uploads")
    shared.put_bytes(b"somebody else's")
    return StoreBelow(shared, "backups/today")


class Toy:
    """Stores an artifact, names it, and ends; jobs whose request is in `held` stay at work until they are let go."""

    def __init__(self, rig: JobRig, store: ObjectStore, *held: str) -> None:
        self._rig, self._store, self._held, self.let_go = rig, store, held, asyncio.Event()

    async def __call__(self, context: JobContext) -> str:
        if job_pb2.GetJobRequest.FromString(context.request).id in self._held:
            await self.let_go.wait()
        digest = await asyncio.to_thread(put_report, self._store, context.job_id)
        await StageCache(self._rig.bus, lambda _: asyncio.sleep(0, True), revision="1").put(context.job_id, digest)
        await Catalog(self._rig.bus).set(context.job_id, digest, REPORT_TYPE, 1)
        return digest


def put_report(store: ObjectStore, about: str) -> str:
    """A stored artifact of two files, one of them shared by all; and a reference to it."""
    files = {"own": f"result of {about}".encode(), "shared": b"shared" * 1000}
    layers = tuple(
        Descriptor(media_type="x", digest=store.put_bytes(data), size_bytes=len(data), path=name)
        for name, data in files.items()
    )
    digest = store.put_manifest(Manifest(artifact_type=REPORT_TYPE, layers=layers))
    store.put_ref(f"reports/{about}", digest)
    return digest


def quiet(_: str) -> None:
    """Progress is of no interest here."""


async def test_a_platform_at_work_is_backed_up_and_lives_on_elsewhere(
    rig: JobRig, store: S3Store, empty: tuple[JobRig, S3Store], place: ObjectStore
) -> None:
    """R-120, R-121, R-125: finished jobs, names and results are there; all other jobs are done again, once."""
    other, other_store = empty
    toy = Toy(rig, store, "held", "leaves")
    async with rig.working({"make": toy}, slots=8):
        done = [await rig.start("make", body=f"done {number}") for number in range(4)]
        held, leaves = await rig.start("make", body="held"), await rig.start("make", body="leaves")
        await rig.until(held.id, model.RUNNING)
        await rig.until(leaves.id, model.RUNNING)
        await asyncio.gather(*(rig.end(job.id) for job in done))
        stop = asyncio.Event()

        async def keep_busy() -> list[str]:
            """Jobs that begin and end while the backup reads."""
            started = []
            while not stop.is_set() and len(started) < 100:
                started.append((await rig.start("make", body=f"busy {len(started)}")).id)
                await asyncio.sleep(0.01)
            return started

        busy = asyncio.create_task(keep_busy())
        await asyncio.sleep(0.2)
        await rig.ledger.cancel(leaves.id)
        taken = await backup.back_up(rig.bus, store, place, report=quiet)
        stop.set()
        started = await busy
        toy.let_go.set()
        await asyncio.gather(*(rig.end(id) for id in [held.id, *started]))
    assert taken.missing == () and taken.objects > 8 and taken.unfinished >= 1 and started

    restored = await backup.restore(other.bus, other_store, place, report=quiet)
    assert (restored.entries, restored.missing) == (taken.entries, ())
    for job in done:
        ended = await other.ledger.get(job.id)
        assert ended.state == model.SUCCEEDED
        assert await Catalog(other.bus).resolve(job.id) == ended.result_digest
        assert other_store.get_ref(f"reports/{job.id}") == ended.result_digest
        for layer in other_store.get_manifest(ended.result_digest).layers:
            assert len(other_store.get_bytes(layer.digest)) == layer.size_bytes
    assert (await other.ledger.get(held.id)).state == model.QUEUED
    assert (await other.ledger.get(leaves.id)).state == model.CANCELLED

    async with other.working({"make": Toy(other, other_store)}, slots=8):
        records, _ = await other.ledger.records()
        ends = await asyncio.gather(*(other.end(record.job.id) for record in records))
    assert {job.state for job in ends if job.id != leaves.id} == {model.SUCCEEDED}
    assert (await other.ledger.get(held.id)).result_digest == (await rig.ledger.get(held.id)).result_digest


async def test_what_is_not_empty_is_refused_and_a_plan_changes_nothing(
    rig: JobRig, store: S3Store, empty: tuple[JobRig, S3Store], tmp_path: Path
) -> None:
    other, other_store = empty
    put_report(store, "one")
    place = LocalStore(tmp_path / "backup")
    planned = await backup.back_up(rig.bus, store, place, report=quiet, is_planned=True)
    assert planned.objects == 3 and not (tmp_path / "backup").exists()
    with pytest.raises(UnknownSource, match="no backup"):
        await backup.restore(other.bus, other_store, place, report=quiet)
    assert await backup.back_up(rig.bus, store, place, report=quiet) == planned
    with pytest.raises(NotEmpty, match="whole backup already"):
        await backup.back_up(rig.bus, store, place, report=quiet)
    with pytest.raises(NotEmpty, match="not empty"):
        await backup.back_up(rig.bus, store, LocalStore(tmp_path), report=quiet)
    with pytest.raises(NotEmpty, match="not empty"):
        await backup.back_up(rig.bus, store, store, report=quiet)
    assert (await backup.restore(other.bus, other_store, place, report=quiet, is_planned=True)).objects == 3
    assert list(other_store.list_blobs()) == []
    await other.bus.bucket(CATALOG_BUCKET).create("name", b"x")
    with pytest.raises(NotEmpty, match=f"holds 1 in {CATALOG_BUCKET}"):
        await backup.restore(other.bus, other_store, place, report=quiet)
    with pytest.raises(NotEmpty, match="2 in blobs, 1 in manifests, 1 in refs"):
        await backup.restore(rig.bus, store, place, report=quiet)


async def test_what_was_interrupted_goes_on(
    rig: JobRig, store: S3Store, empty: tuple[JobRig, S3Store], tmp_path: Path
) -> None:
    """A backup without its last object is none yet; half a restoration is completed by the same backup only."""
    other, other_store = empty
    digests = [put_report(store, str(number)) for number in range(3)]
    jobs = [await rig.start("make", body=str(number)) for number in range(3)]
    place = LocalStore(tmp_path / "backup")
    await backup.back_up(rig.bus, store, place, report=quiet)
    state = (tmp_path / "backup" / "refs" / "backup" / "state").read_text()
    place.delete_ref("backup/state")
    place.delete_blob(store.get_manifest(digests[0]).layers[0].digest)
    again = await backup.back_up(rig.bus, store, place, report=quiet)
    assert again.objects == 7 and again.missing == ()
    assert (tmp_path / "backup" / "refs" / "backup" / "state").read_text() == state

    other_store.put_ref("backup/restoring", state)
    entry = await rig.bus.bucket(JOBS_BUCKET).get(jobs[0].id)
    assert entry is not None
    await other.bus.bucket(JOBS_BUCKET).create(jobs[0].id, entry.value)
    await backup.restore(other.bus, other_store, place, report=quiet)
    assert {job.id for job in await other.ledger.list()} == {job.id for job in jobs}
    assert set(other_store.list_manifests()) == set(digests)
    with pytest.raises(NotEmpty):
        await backup.restore(other.bus, other_store, place, report=quiet)


async def test_a_damaged_backup_is_refused(
    rig: JobRig, store: S3Store, empty: tuple[JobRig, S3Store], tmp_path: Path
) -> None:
    other, other_store = empty
    digest = store.get_manifest(put_report(store, "one")).layers[0].digest
    await backup.back_up(rig.bus, store, LocalStore(tmp_path / "backup"), report=quiet)
    shutil.copytree(tmp_path / "backup", tmp_path / "bent")
    blob = tmp_path / "bent" / blob_key(digest)
    blob.write_bytes(blob.read_bytes()[::-1])
    with pytest.raises(DigestMismatch, match=digest):
        await backup.restore(other.bus, other_store, LocalStore(tmp_path / "bent"), report=quiet)
    with pytest.raises(BadFile, match="malformed"):
        backup.State.from_bytes(json.dumps({"format": "smelt-backup", "version": 1}).encode() + b"\n{}\n")
    with pytest.raises(BadFile, match="this release reads"):
        backup.State.from_bytes(b'{"format": "smelt-backup", "version": 9}\n')


async def test_the_command_backs_up_and_restores(
    rig: JobRig, store: S3Store, empty: tuple[JobRig, S3Store], tmp_path: Path
) -> None:
    """`smelt admin` on the servers that SMELT_PLATFORM_* name, into a prefix of another bucket."""
    other, other_store = empty
    digest = put_report(store, "one")
    await Catalog(rig.bus).set("named", digest, REPORT_TYPE, 1)
    kept = S3Store(replace(store.config, s3_bucket=f"{store.config.s3_bucket}-kept"))
    place = f"s3://{kept.config.s3_bucket}/first"
    assert "has no bucket" in str(await smelt_admin("backup", place, rig, store))
    kept.ensure_bucket()
    done = await smelt_admin("backup", place, rig, store)
    assert (done["objects"], done["entries"][CATALOG_BUCKET], done["is_planned"]) == (3, 1, False)
    assert (await smelt_admin("restore", place, other, other_store))["objects"] == 3
    assert await Catalog(other.bus).resolve("named") == digest
    for wrong, says in (("/proc/none", "a folder that can be written"), ("s3://Kept_Here/a", "s3_bucket='Kept_Here'")):
        assert says in str(await smelt_admin("backup", wrong, rig, store))


async def smelt_admin(verb: str, place: str, rig: JobRig, store: S3Store) -> dict[str, object]:
    """The document that the command prints."""
    config = replace(store.config, nats_url=rig.server.url)
    settings = {
        "SMELT_PLATFORM_NATS_URL": config.nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": config.s3_endpoint,
        "SMELT_PLATFORM_S3_ACCESS_KEY": config.s3_access_key,
        "SMELT_PLATFORM_S3_SECRET_KEY": config.s3_secret_key,
        "SMELT_PLATFORM_S3_BUCKET": config.s3_bucket,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.cli.main", "admin", verb, place, "--json"),
        env=environment(settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    document: dict[str, object] = json.loads(out or err)
    return document
