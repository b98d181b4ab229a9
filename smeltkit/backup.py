"""A platform's state and artifacts as one folder or S3 prefix, and back into an empty platform.

A backup is a store of its own: the platform's blobs and manifests under their digests, and one blob of JSON lines with
every entry of the buckets below, its revision, and every reference. `refs/backup/state` names that blob and is written
last, so what has it is whole; `refs/backup/begun` says whose unfinished copy may be gone on with.

Reading goes against the order in which work writes: jobs, names, stages, references, manifests, blobs. So on a busy
platform all that is read leads only to what is read later, and needs no lock. Writing goes the other way.

Revisions of a restored platform are new ones, so fencing tokens begin anew, and jobs that were at work are queued. Not
kept: leases and queues, which follow from the records, and events and dead letters.
"""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from smelt.artifact.v1 import artifact_pb2
from smelt.job.v1 import job_pb2

from smeltkit import limits
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.store import BLOBS, MANIFESTS, REFS, StoredObject, digest_of_key
from smeltkit.bus.kv import Entry
from smeltkit.bus.subjects import CATALOG_BUCKET, JOBS_BUCKET, STAGES_BUCKET
from smeltkit.errors import (
    BadFile,
    DigestMismatch,
    NotEmpty,
    RevisionConflict,
    UnknownArtifact,
    UnknownBlob,
    UnknownSource,
)
from smeltkit.ids import digest_bytes
from smeltkit.jobs import model
from smeltkit.jobs.ledger import JobLedger, LedgerBus

BUCKETS: Final = (JOBS_BUCKET, CATALOG_BUCKET, STAGES_BUCKET)
"""What is kept of NATS, in the order of reading."""
_STATE, _BEGUN, _RESTORING = "backup/state", "backup/begun", "backup/restoring"
_FORMAT: Final = {"format": "smelt-backup", "version": 1}


@dataclass(frozen=True, kw_only=True)
class State:
    """What the platform knew: entries by bucket, oldest write first, and references by name."""

    buckets: Mapping[str, tuple[Entry, ...]]
    refs: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """JSON lines: the format, then one entry or reference a line."""
        lines: list[dict[str, object]] = [dict(_FORMAT)]
        for bucket, entries in self.buckets.items():
            for entry in entries:
                value = base64.b64encode(entry.value).decode()
                lines.append({"bucket": bucket, "key": entry.key, "revision": entry.revision, "value": value})
        lines += [{"ref": name, "digest": digest} for name, digest in self.refs.items()]
        return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """The state of such lines; BadFile."""
        buckets: dict[str, list[Entry]] = {bucket: [] for bucket in BUCKETS}
        refs: dict[str, str] = {}
        try:
            head, *lines = (json.loads(line) for line in data.splitlines())
            if head != _FORMAT:
                raise BadFile(f"the backup's state begins with {head!r}; this release reads {_FORMAT!r}")
            for line in lines:
                if "ref" in line:
                    refs[line["ref"]] = line["digest"]
                    continue
                value = base64.b64decode(line["value"], validate=True)
                buckets[line["bucket"]].append(Entry(key=line["key"], value=value, revision=line["revision"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(f"the backup's state is malformed ({error!r}); take another backup") from error
        return cls(buckets={bucket: tuple(entries) for bucket, entries in buckets.items()}, refs=refs)

    def results(self) -> set[str]:
        """Digests of the artifacts that names and finished jobs lead to; entries that do not parse lead nowhere."""
        found = set(self.refs.values())
        for entry in self.buckets[CATALOG_BUCKET]:
            with suppress(DecodeError):
                found.add(artifact_pb2.Name.FromString(entry.value).digest)
        return (found | {record.job.result_digest for record in self.records()}) - {""}

    def records(self) -> list[job_pb2.JobRecord]:
        """The jobs' records that parse."""
        records = []
        for entry in self.buckets[JOBS_BUCKET]:
            with suppress(DecodeError):
                records.append(job_pb2.JobRecord.FromString(entry.value))
        return records


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a backup or a restoration moves, or would move."""

    entries: Mapping[str, int]
    """Entries by bucket."""
    unfinished: int
    """Jobs that are queued again when they are restored."""
    objects: int
    """Blobs and manifests."""
    size_bytes: int
    missing: tuple[str, ...] = ()
    """Digests that names, results or manifests lead to although nothing is stored under them."""


Report = Callable[[str], None]


async def back_up(
    bus: LedgerBus, store: ObjectStore, target: ObjectStore, *, report: Report, is_planned: bool = False
) -> Summary:
    """Copies the platform into `target` and reads every object back; `is_planned` only looks. NotEmpty."""
    await asyncio.to_thread(_check_target, target)
    state = await _read_state(bus, store)
    objects = await asyncio.to_thread(_objects_of, store)
    if not is_planned:
        await asyncio.to_thread(target.put_ref, _BEGUN, digest_bytes(b""))
        objects = await asyncio.to_thread(_move, store, target, objects, report)
        digest = await asyncio.to_thread(target.put_bytes, state.to_bytes())
        await asyncio.to_thread(target.put_ref, _STATE, digest)
    return await asyncio.to_thread(_summary, state, store if is_planned else target, objects)


async def restore(
    bus: LedgerBus, store: ObjectStore, source: ObjectStore, *, report: Report, is_planned: bool = False
) -> Summary:
    """Fills an empty platform from the backup `source`, and reads every object back; `is_planned` only looks.

    An interrupted restoration of the same backup is gone on with. UnknownSource, BadFile, NotEmpty, DigestMismatch.
    """
    digest = await asyncio.to_thread(source.get_ref, _STATE)
    if digest is None:
        raise UnknownSource("there is no backup, or only an unfinished one (refs/backup/state is missing)")
    state = State.from_bytes(await asyncio.to_thread(source.get_bytes, digest, max_bytes=limits.BACKUP_STATE_MAX_BYTES))
    await _check_platform(bus, store, digest)
    objects = [item for item in await asyncio.to_thread(_objects_of, source) if digest_of_key(item.key) != digest]
    if not is_planned:
        await asyncio.to_thread(store.put_ref, _RESTORING, digest)
        await asyncio.to_thread(_move, source, store, objects, report)
        for name, points_at in state.refs.items():
            await asyncio.to_thread(store.put_ref, name, points_at)
        await _write_state(bus, state)
        await asyncio.to_thread(store.delete_ref, _RESTORING)
    return await asyncio.to_thread(_summary, state, source, objects)


def is_whole(target: ObjectStore) -> bool:
    """Whether there is a backup that can be restored."""
    return target.get_ref(_STATE) is not None


def unmark(target: ObjectStore) -> None:
    """Takes back that there is a whole backup, before it is deleted."""
    target.delete_ref(_STATE)


async def _read_state(bus: LedgerBus, store: ObjectStore) -> State:
    buckets = {bucket: tuple(await bus.bucket(bucket).entries()) for bucket in BUCKETS}
    names = await asyncio.to_thread(lambda: [item.key.removeprefix(f"{REFS}/") for item in store.list_objects(REFS)])
    found = {name: await asyncio.to_thread(store.get_ref, name) for name in names}
    return State(buckets=buckets, refs={name: digest for name, digest in found.items() if digest is not None})


async def _write_state(bus: LedgerBus, state: State) -> None:
    """Stages, names, jobs; a key that an interrupted restoration wrote stays as it is by now."""
    ledger = JobLedger(bus)
    for name in reversed(BUCKETS):
        bucket = bus.bucket(name)
        for entry in state.buckets[name]:
            record = _revived(entry.value) if name == JOBS_BUCKET else None
            with suppress(RevisionConflict):
                await bucket.create(entry.key, entry.value if record is None else record.SerializeToString())
            if record is not None and record.job.state == model.QUEUED:
                await ledger.dispatch(record)


def _revived(value: bytes) -> job_pb2.JobRecord | None:
    try:
        return model.revive(job_pb2.JobRecord.FromString(value), now_ns=time.time_ns())
    except DecodeError:
        return None


def _check_target(target: ObjectStore) -> None:
    if is_whole(target):
        raise NotEmpty("there is a whole backup already; name another folder or prefix")
    if target.get_ref(_BEGUN) is None and not target.is_empty():
        raise NotEmpty("the place for the backup is not empty; name an empty or new folder or prefix")


async def _check_platform(bus: LedgerBus, store: ObjectStore, digest: str) -> None:
    if await asyncio.to_thread(store.get_ref, _RESTORING) == digest:
        return
    counts = {bucket: len(await bus.bucket(bucket).entries()) for bucket in BUCKETS}
    for kind in (BLOBS, MANIFESTS, REFS):
        counts[kind] = len(await asyncio.to_thread(list, store.list_objects(kind)))
    held = ", ".join(f"{count} in {name}" for name, count in counts.items() if count)
    if held:
        raise NotEmpty(f"the platform holds {held}; restore into a new one (another SMELT_HOME, or new servers)")


def _objects_of(store: ObjectStore) -> list[StoredObject]:
    """Manifests, then blobs: what a manifest needs was stored before it, and is found."""
    return [item for kind in (MANIFESTS, BLOBS) for item in store.list_objects(kind) if digest_of_key(item.key)]


def _move(source: ObjectStore, target: ObjectStore, objects: list[StoredObject], report: Report) -> list[StoredObject]:
    """Copies blobs, then manifests, and reads them back; those that were there. A clean-up may have taken the rest."""
    blobs = [item for item in objects if item.key.startswith(f"{BLOBS}/")]
    manifests = [item for item in objects if item.key.startswith(f"{MANIFESTS}/")]
    report(f"copying {len(blobs)} blobs and {len(manifests)} manifests")
    with (
        tempfile.TemporaryDirectory(prefix="smelt-backup-") as folder,
        ThreadPoolExecutor(limits.PARTS_PARALLEL_MAX, thread_name_prefix="backup") as pool,
    ):
        has_blob = list(pool.map(lambda item: _copy_blob(source, target, item, Path(folder)), blobs))
        has_manifest = list(pool.map(lambda item: _copy_manifest(source, target, item), manifests))
        kept = [
            item for item, is_there in zip((*blobs, *manifests), (*has_blob, *has_manifest), strict=True) if is_there
        ]
        report(f"reading {len(kept)} objects back")
        list(pool.map(lambda item: _prove(target, item), kept))
    return kept


def _copy_blob(source: ObjectStore, target: ObjectStore, item: StoredObject, folder: Path) -> bool:
    digest = _digest(item)
    if target.size(digest) == item.size_bytes:
        return True
    path = folder / digest.removeprefix("sha256:")
    try:
        source.fetch(digest, path)
        target.put_file(path)
    except UnknownBlob:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _copy_manifest(source: ObjectStore, target: ObjectStore, item: StoredObject) -> bool:
    try:
        target.put_manifest(source.get_manifest(_digest(item)))
    except (UnknownArtifact, UnknownBlob):
        return False
    return True


def _prove(store: ObjectStore, item: StoredObject) -> None:
    digest = _digest(item)
    if item.key.startswith(f"{MANIFESTS}/"):
        store.get_manifest(digest)
    elif (found := store.reread(digest)) != (digest, item.size_bytes):
        raise DigestMismatch(f"{digest} was copied and reads back as {found[0]} with {found[1]} bytes; try again")


def _digest(item: StoredObject) -> str:
    digest = digest_of_key(item.key)
    assert digest is not None
    return digest


def _summary(state: State, store: ObjectStore, objects: Iterable[StoredObject]) -> Summary:
    items = list(objects)
    stored = {_digest(item) for item in items}
    wanted = state.results()
    for item in items:
        if item.key.startswith(f"{MANIFESTS}/"):
            wanted |= {layer.digest for layer in store.get_manifest(_digest(item)).layers}
    return Summary(
        entries={bucket: len(entries) for bucket, entries in state.buckets.items()},
        unfinished=sum(record.job.state not in model.FINAL for record in state.records()),
        objects=len(items),
        size_bytes=sum(item.size_bytes for item in items),
        missing=tuple(sorted(wanted - stored)),
    )
