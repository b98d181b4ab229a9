"""The importer's small parts: settings, workspaces, threads, probes, requests."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2
from smelt.inference.v1 import inference_pb2

from services.importer import spec
from services.importer.config import ImporterConfig
from smeltkit import probing as probe
from smeltkit.blobs.local import LocalStore
from smeltkit.config import from_environment
from smeltkit.errors import BadConfig, BadDigest, BadManifest, BadRequest, DiskFull, JobCancelled, ProbeFailed
from smeltkit.ids import digest_bytes
from smeltkit.jobs import threads
from smeltkit.manifest import PROBE_TYPE, Manifest
from smeltkit.workspaces import Workspaces

BUNDLE, ENGINE = digest_bytes(b"bundle"), digest_bytes(b"engine")


@pytest.mark.parametrize(
    "settings", [{"inference_address": "nowhere"}, {"slots": 0}, {"slots": 65}, {"threads": -1}, {"cache_bytes": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    """With field and value."""
    with pytest.raises(BadConfig, match=f"{next(iter(settings))}="):
        ImporterConfig(**{"inference_address": "127.0.0.1:1", **settings})


def test_settings_come_from_the_environment() -> None:
    """By the documented names."""
    environ = {"SMELT_IMPORTER_INFERENCE_ADDRESS": "127.0.0.1:7", "SMELT_IMPORTER_CACHE_DIR": "x"}
    assert from_environment(ImporterConfig, "SMELT_IMPORTER_", environ).cache_dir == Path("x")


def test_workspace_is_gone_after_the_work_and_after_an_error(tmp_path: Path) -> None:
    """Nothing half-written stays."""
    workspaces = Workspaces(tmp_path)
    with pytest.raises(ValueError, match="stop"), workspaces.folder() as folder:
        (folder / "half").write_text("x")
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())


def test_workspace_of_a_dead_process_is_reaped_and_a_live_one_kept(tmp_path: Path) -> None:
    """The lock tells them apart."""
    workspaces = Workspaces(tmp_path)
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead.lock").touch()
    with workspaces.folder() as alive:
        assert workspaces.reap() == 1
        assert alive.is_dir() and not (tmp_path / "dead").exists()


class Context:
    """What a thread needs of a job."""

    def __init__(self) -> None:
        self.job_id, self.cancelled = "job-1", asyncio.Event()
        self.seen: list[tuple[str, int, int]] = []

    async def progress(self, phase: str, done: int, total: int, unit: str = "", message: str = "") -> None:
        """Remembers."""
        self.seen.append((phase, done, total))


async def test_progress_of_a_thread_reaches_the_job() -> None:
    """In order, and never above the total."""
    context = cast(Any, Context())
    report = threads.Reporter(context).phase("fetch", 10)
    await threads.run(context, lambda: [report(done) for done in (3, 12)])
    await asyncio.sleep(0)
    assert context.seen == [("fetch", 3, 10), ("fetch", 10, 10)]


async def test_cancel_stops_the_thread_at_its_next_report() -> None:
    """And waits for it, so that its files can be removed."""
    context, ended = cast(Any, Context()), []
    report = threads.Reporter(context).phase("fetch", 10)

    def work() -> None:
        try:
            while True:
                report(1)
                time.sleep(0.005)
        finally:
            ended.append(True)

    task = asyncio.create_task(threads.run(context, work))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_report_after_cancel_raises() -> None:
    """The way in which a thread notices."""
    context = cast(Any, Context())
    context.cancelled.set()
    with pytest.raises(JobCancelled):
        threads.Reporter(context).phase("fetch", 10)(1)


async def test_full_disk_is_told_as_such() -> None:
    """Retryable, with the remedy; other faults of files pass as they are."""

    def fill() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="no space"):
        await threads.run(cast(Any, Context()), fill)


class FakeProber:
    """Answers with fixed results."""

    def __init__(self, *texts: str) -> None:
        results = [inference_pb2.ProbeResult(prompt="p", ids=[1] if text else [], text=text) for text in texts]
        self.response = inference_pb2.ProbeResponse(results=results, engine_digest=ENGINE)

    async def probe(self, bundle: str) -> inference_pb2.ProbeResponse:
        """The response."""
        return self.response


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store on a folder."""
    return LocalStore(tmp_path / "store")


async def test_probe_needs_text_from_at_least_one_prompt(store: LocalStore) -> None:
    """R-016: blank text is no text."""
    for texts in ((), ("", ""), (" \n",)):
        with pytest.raises(ProbeFailed, match="no text"):
            await probe.prove(FakeProber(*texts), store, BUNDLE)


async def test_probe_without_a_record_about_the_bundle_fails(store: LocalStore) -> None:
    """What nobody can compare with later proves nothing."""
    with pytest.raises(ProbeFailed, match="no record"):
        await probe.prove(FakeProber("ok"), store, BUNDLE)
    other = store.put_manifest(Manifest(artifact_type=PROBE_TYPE, subject=digest_bytes(b"other")))
    store.put_ref(probe.reference(BUNDLE, ENGINE), other)
    with pytest.raises(ProbeFailed, match="no record"):
        await probe.prove(FakeProber("ok"), store, BUNDLE)
    record = store.put_manifest(Manifest(artifact_type=PROBE_TYPE, subject=BUNDLE))
    store.put_ref(probe.reference(BUNDLE, ENGINE), record)
    assert await probe.prove(FakeProber("", "ok"), store, BUNDLE) == record


def upload(**changes: Any) -> importer_pb2.ImportSpec:
    """An import of one uploaded file."""
    file = artifact_pb2.Descriptor(**{"digest": BUNDLE, "size_bytes": 1, "path": "config.json", **changes})
    return importer_pb2.ImportSpec(upload=importer_pb2.UploadSource(files=[file]))


@pytest.mark.parametrize(
    ("request_spec", "error"),
    [
        (importer_pb2.ImportSpec(), BadRequest),
        (importer_pb2.ImportSpec(upload=importer_pb2.UploadSource()), BadRequest),
        (importer_pb2.ImportSpec(hub=importer_pb2.HubSource(repository="nonsense")), BadRequest),
        (importer_pb2.ImportSpec(hub=importer_pb2.HubSource(repository="a/b", revision="../x")), BadRequest),
        (upload(digest="sha256:short"), BadDigest),
        (upload(path="../config.json"), BadManifest),
        (upload(path="/etc/passwd"), BadManifest),
        (upload(size_bytes=-1), BadManifest),
    ],
    ids=str,
)
def test_request_that_names_no_source_is_refused(request_spec: importer_pb2.ImportSpec, error: type[Exception]) -> None:
    """Before anything is fetched."""
    with pytest.raises(error):
        spec.source_of(request_spec, cast(Any, SimpleNamespace()))
