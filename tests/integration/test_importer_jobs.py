"""Imports as jobs: from a hub, twice at once, cancelled, and with the importer killed in the middle."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from nats.aio.msg import Msg
from smelt.event.v1 import event_pb2
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from smeltkit.errors import (
    BadManifest,
    DigestMismatch,
    HubDenied,
    RequestIdReused,
    UnknownArtifact,
    UnknownModel,
    UnknownSource,
    UnsupportedQuantization,
)
from smeltkit.ml.bundle import Bundle
from smeltkit.rpc.channel import call
from smeltkit.testing.hub import COMMIT, Hub
from smeltkit.testing.importing import CALL_TIMEOUT_S, ImportRig, succeeded
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.tiny_models import write_tiny_model
from smeltkit.testing.waiting import eventually

REPOSITORY = "smelt-org/hosted"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny completion model of this test's own."""
    write_tiny_model(tmp_path / "tiny", "qwen3", is_chat=False, seed=uuid4().int % 2**32)
    return tmp_path / "tiny"


def hosted(hub: Hub, folder: Path, name: str = "") -> importer_pb2.ImportSpec:
    """A spec that imports `folder` from the hub."""
    hub.repositories[REPOSITORY] = folder
    return importer_pb2.ImportSpec(hub=importer_pb2.HubSource(repository=REPOSITORY, revision="main"), name=name)


async def test_hub_repository_becomes_a_bundle_with_its_commit(importing: ImportRig, hub: Hub, tiny: Path) -> None:
    """HF_ENDPOINT decides where from; the lineage has the commit, not the branch."""
    digest = succeeded(await importing.end(await importing.start_import(hosted(hub, tiny, "hosted"))))
    assert Bundle.from_manifest(importing.store.get_manifest(digest)).lineage.origin == f"hf://{REPOSITORY}@{COMMIT}"
    assert await importing.catalog.resolve("hosted") == digest
    again = await importing.start_import(hosted(hub, tiny, "hosted:again"))
    assert again.is_cached and again.result_digest == digest


async def test_hub_that_refuses_is_told_before_any_job(importing: ImportRig, hub: Hub) -> None:
    """404 and 401 come back from the call itself."""
    spec = importer_pb2.ImportSpec(hub=importer_pb2.HubSource(repository="smelt-org/nothing"))
    with pytest.raises(UnknownSource, match="smelt-org/nothing"):
        await importing.start_import(spec)
    hub.fail("/api/models/smelt-org/private", 401, times=1, code="RepoNotFound")
    spec.hub.repository = "smelt-org/private"
    with pytest.raises(HubDenied, match="HF_TOKEN"):
        await importing.start_import(spec)


async def test_stored_bundle_is_announced_once_it_has_its_name(importing: ImportRig, tiny: Path) -> None:
    """The event says what, under which name, by which job."""
    heard: list[event_pb2.BundleStored] = []

    async def hear(message: Msg) -> None:
        heard.append(event_pb2.BundleStored.FromString(message.data))

    async with importing.bus.listen("smelt.evt.importer.bundle.stored.default", hear):
        job = await importing.import_folder(tiny, "announced")
        event = await eventually(lambda: next((event for event in heard if event.job_id == job.id), None))
    assert event is not None
    assert (event.digest, event.name, event.operation) == (succeeded(job), "announced", "import")
    assert event.size_bytes == importing.store.get_manifest(event.digest).size_bytes


async def test_same_request_id_is_the_same_job(importing: ImportRig, tiny: Path) -> None:
    """A caller that lost the answer asks again; another request under the id is refused."""
    spec = importer_pb2.ImportSpec(upload=importing.upload(tiny), name="idempotent")
    request_id = uuid4().hex
    first, second = [await importing.start_import(spec, request_id) for _ in range(2)]
    assert first.id == second.id
    succeeded(await importing.end(first))
    spec.name = "another"
    with pytest.raises(RequestIdReused):
        await importing.start_import(spec, request_id)


async def test_importer_killed_in_the_middle_finishes_the_same_job(
    importing: ImportRig, importer: ServiceProcess, tiny: Path
) -> None:
    """kill -9 while it works: after a restart the job ends as it would have, once, and leaves no work folder."""
    job = await importing.start_import(importer_pb2.ImportSpec(upload=importing.upload(tiny), name="survivor"))
    await importing.leaves(job, job_pb2.JOB_STATE_QUEUED)
    importer.kill()
    importer.start()
    ended = await importing.end(job)
    assert await importing.catalog.resolve("survivor") == succeeded(ended)
    assert not [path for path in importer.folder.glob("importer/work/*") if path.is_dir()]


async def test_cancelled_import_sets_no_name(importing: ImportRig, tmp_path: Path) -> None:
    """Cancel frees the worker; nothing half-written is left behind."""
    write_tiny_model(tmp_path / "chatty", "qwen3", num_hidden_layers=8, seed=uuid4().int % 2**32)
    job = await importing.start_import(
        importer_pb2.ImportSpec(upload=importing.upload(tmp_path / "chatty"), name="cancelled")
    )
    await importing.leaves(job, job_pb2.JOB_STATE_QUEUED)
    await importing.ledger.cancel(job.id)
    assert (await importing.end(job)).state == job_pb2.JOB_STATE_CANCELLED
    with pytest.raises(UnknownModel):
        await importing.catalog.resolve("cancelled")


async def test_upload_with_a_wrong_size_is_refused(importing: ImportRig, tiny: Path) -> None:
    """The caller's word about a blob is not believed."""
    source = importing.upload(tiny)
    weights = next(file for file in source.files if file.path == "model.safetensors")
    weights.size_bytes -= 8
    job = await importing.end(await importing.start_import(importer_pb2.ImportSpec(upload=source)))
    assert job.state == job_pb2.JOB_STATE_FAILED and job.error.reason == DigestMismatch.reason()


async def test_quantize_of_what_is_not_there_is_not_found(importing: ImportRig) -> None:
    """By name and by digest; a scheme that is none is told before."""
    with pytest.raises(UnknownModel):
        await importing.start_quantize("never-imported", "Q8_0")
    with pytest.raises(UnknownArtifact):
        await importing.start_quantize("sha256:" + "0" * 64, "Q8_0")
    with pytest.raises(UnsupportedQuantization, match="known are"):
        await importing.start_quantize("sha256:" + "0" * 64, "Q9_0")


async def test_plan_of_a_broken_source_lists_the_refusal(importing: ImportRig, tiny: Path, tmp_path: Path) -> None:
    """IMP-2: a plan is an answer, also when the answer is no."""
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (folder / "tokenizer_config.json").unlink()
    request = importer_pb2.PlanImportRequest(spec=importer_pb2.ImportSpec(upload=importing.upload(folder)))
    plan = (await call(importing.stub.PlanImport, request, timeout_s=CALL_TIMEOUT_S)).plan
    assert [refusal.reason for refusal in plan.refusals] == ["BUNDLE_INCOMPLETE"]
    assert "tokenizer_config.json" in plan.refusals[0].message


async def test_origin_that_tells_of_the_machine_is_refused(importing: ImportRig, tiny: Path) -> None:
    """A lineage travels to other people."""
    spec = importer_pb2.ImportSpec(upload=importing.upload(tiny, origin="/home/somebody/models/tiny"))
    with pytest.raises(BadManifest, match="host path"):
        await importing.start_import(spec)
