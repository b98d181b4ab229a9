"""Real models through the real importer: imported, probed, named, quantized, checked, inspected."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.errors import BundleIncomplete, UnknownModel, UnsafeFile, UnsupportedArchitecture, UnsupportedQuantization
from smeltkit.manifest import PROBE_TYPE
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.quantization import planned_types
from smeltkit.rpc.channel import call
from smeltkit.testing.importing import CALL_TIMEOUT_S, ImportRig, import_rig, import_services
from smeltkit.testing.nats import NatsServer
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server, fresh_store
from smeltkit.testing.tiny_models import write_tiny_model

MODELS = Path(__file__).parents[3] / "shared" / "models"
SMALL = Path(__file__).parents[2] / "examples" / "models" / "ore-11m"


@pytest.fixture(scope="module")
def platform(nats: NatsServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> PlatformConfig:
    """NATS with its topology and a bucket of this module's own."""
    config = fresh_store(s3, tmp_path_factory.mktemp("uploads")).config

    async def prepare() -> None:
        bus = await Bus.connect(nats.config, name="prepare")
        await topology.apply(bus)
        await bus.close()

    asyncio.run(prepare())
    return replace(config, nats_url=nats.config.nats_url)


@pytest.fixture(scope="module")
def importer(platform: PlatformConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One importer and one inference service for all tests of this module."""
    with import_services(platform, tmp_path_factory.mktemp("services")) as process:
        yield process


@pytest.fixture
async def rig(importer: ServiceProcess, platform: PlatformConfig, tmp_path: Path) -> AsyncIterator[ImportRig]:
    """A caller."""
    async with import_rig(importer.address, platform, tmp_path / "state") as made:
        yield made


def succeeded(job: job_pb2.Job) -> str:
    """The result of a job that must have succeeded."""
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job
    return job.result_digest


async def test_folder_becomes_a_named_and_probed_bundle(rig: ImportRig) -> None:
    """R-016, R-017: stored whole, generates in a clean process, and only then has a name."""
    digest = succeeded(await rig.import_folder(SMALL, "ore-small"))
    assert await rig.catalog.resolve("ore-small") == digest
    bundle = Bundle.from_manifest(rig.store.get_manifest(digest))
    assert (bundle.format, bundle.scheme, bundle.licence) == ("safetensors", "BF16", "Apache-2.0")
    assert bundle.config.parameters == 10_759_424
    names = list(rig.store.list_refs(f"probes/{digest.removeprefix('sha256:')}/"))
    record = rig.store.get_manifest(rig.store.get_ref(names[0]) or "")
    assert record.artifact_type == PROBE_TYPE and record.subject == digest
    assert all(result["ids"] for result in record.config["results"])


async def test_second_import_is_answered_from_the_cache(rig: ImportRig) -> None:
    """R-013: the same files give the same bundle at once, and the new name points at it."""
    first = succeeded(await rig.import_folder(SMALL, "cache-first"))
    again = await rig.import_folder(SMALL, "cache-second")
    assert again.is_cached and succeeded(again) == first
    assert await rig.catalog.resolve("cache-second") == first


@pytest.mark.parametrize("model", ["ore-11m-base", "ore-34m-instruct"])
async def test_shared_models_import_with_every_tensor(rig: ImportRig, model: str) -> None:
    """R-015, R-021: single file and shards alike; the tensors stored are those the config declares."""
    digest = succeeded(await rig.import_folder(MODELS / model, model))
    view = await call(rig.stub.Inspect, importer_pb2.InspectRequest(bundle=model), timeout_s=CALL_TIMEOUT_S)
    config = Bundle.from_manifest(rig.store.get_manifest(digest)).config
    declared = {spec.name: spec.shape for spec in config.tensors()}
    assert {tensor.name: tuple(tensor.shape) for tensor in view.tensors} == declared
    assert view.parameters == config.parameters
    assert view.artifact.digest == digest


@pytest.mark.parametrize("scheme", ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
async def test_requested_scheme_is_the_stored_scheme(rig: ImportRig, scheme: str, tmp_path: Path) -> None:
    """R-003, R-004: type by type as forecast, and the lineage names the source."""
    write_tiny_model(tmp_path / "tiny", "qwen3", is_chat=False, hidden_size=256, intermediate_size=1280)
    source = succeeded(await rig.import_folder(tmp_path / "tiny", "to-quantize"))
    digest = succeeded(await rig.quantize("to-quantize", scheme, f"tiny:{scheme.lower()}"))
    manifest = rig.store.get_manifest(digest)
    bundle = Bundle.from_manifest(manifest)
    assert (bundle.format, bundle.scheme, bundle.lineage.inputs) == ("gguf", scheme, (source,))
    weights = manifest.layer("model.gguf")
    assert weights is not None
    rig.store.fetch(weights.digest, tmp_path / "model.gguf")
    stored = {name: info.dtype for name, info in GgufFile.open(tmp_path / "model.gguf").tensors.items()}
    assert stored == planned_types(bundle.config, scheme)


async def test_quantized_bundle_cannot_be_quantized_again(rig: ImportRig) -> None:
    """R-020: lost bits do not come back, so the second step is refused before it starts."""
    await rig.import_folder(SMALL, "once")
    succeeded(await rig.quantize("once", "Q8_0", "once:q8_0"))
    with pytest.raises(UnsupportedQuantization, match="Q8_0"):
        await rig.start_quantize("once:q8_0", "Q4_K_M")


async def test_gguf_bundle_exports_and_imports_with_the_same_probe(rig: ImportRig, tmp_path: Path) -> None:
    """R-018, R-020: a GGUF file alone becomes a whole bundle again, and says the same."""
    await rig.import_folder(SMALL, "round-trip")
    first = succeeded(await rig.quantize("round-trip", "F16", "round-trip:f16"))
    folder = tmp_path / "exported"
    folder.mkdir()
    layer = rig.store.get_manifest(first).layer("model.gguf")
    assert layer is not None
    rig.store.fetch(layer.digest, folder / "ore.gguf")
    second = succeeded(await rig.import_folder(folder, "round-trip:back"))
    assert probe_ids(rig.store, second) == probe_ids(rig.store, first)
    assert Bundle.from_manifest(rig.store.get_manifest(second)).licence == "LicenseRef-unknown"


async def test_check_reports_structure_and_probe(rig: ImportRig) -> None:
    """R-016: the report of a check is about the bundle and holds the digest of a probe."""
    digest = succeeded(await rig.import_folder(SMALL, "to-check"))
    request = importer_pb2.StartCheckRequest(bundle="to-check", request_id="check-1")
    job = (await call(rig.stub.StartCheck, request, timeout_s=CALL_TIMEOUT_S)).job
    report = rig.store.get_manifest(succeeded(await rig.end(job)))
    assert report.subject == digest
    assert [entry["check"] for entry in report.config["checks"]] == [
        "bytes",
        "parts",
        "tensors",
        "contract",
        "tokenizer",
    ]
    assert rig.store.get_manifest(report.config["probe"]).artifact_type == PROBE_TYPE


async def test_check_finds_a_blob_that_rotted_in_the_store(rig: ImportRig, tmp_path: Path) -> None:
    """R-013: bytes are read again from the store; a manifest alone proves nothing."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "LICENSE").write_text("SPDX-License-Identifier: MIT\n")
    digest = succeeded(await rig.import_folder(folder, "to-rot"))
    layer = rig.store.get_manifest(digest).layer("LICENSE")
    assert layer is not None
    rig.store.delete_blob(layer.digest)
    job = (
        await call(
            rig.stub.StartCheck,
            importer_pb2.StartCheckRequest(bundle=digest, request_id="rot"),
            timeout_s=CALL_TIMEOUT_S,
        )
    ).job
    ended = await rig.end(job)
    assert ended.state == job_pb2.JOB_STATE_FAILED and ended.error.reason == "UNKNOWN_BLOB"


async def test_missing_tokenizer_is_refused_before_any_job(rig: ImportRig, tmp_path: Path) -> None:
    """R-017: the error names the file."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleIncomplete, match=r"tokenizer\.json"):
        await rig.import_folder(folder)


async def test_pickle_weights_are_refused(rig: ImportRig, tmp_path: Path) -> None:
    """R-030."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match=r"pytorch_model\.bin"):
        await rig.import_folder(folder)


async def test_unknown_architecture_is_refused(rig: ImportRig, tmp_path: Path) -> None:
    """The message lists the known ones."""
    folder = copy_of(SMALL, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}))
    with pytest.raises(UnsupportedArchitecture, match="qwen2"):
        await rig.import_folder(folder)


async def test_truncated_weights_fail_the_job_and_set_no_name(rig: ImportRig, tmp_path: Path) -> None:
    """Nothing half-written: no bundle, no name, and the reason names the file."""
    folder = copy_of(SMALL, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    before = set(rig.store.list_manifests())
    ended = await rig.import_folder(folder, "half")
    assert ended.error.reason == "BAD_SAFETENSORS" and "model.safetensors" in ended.error.message
    assert set(rig.store.list_manifests()) == before
    with pytest.raises(UnknownModel):
        await rig.catalog.resolve("half")


async def test_model_that_says_nothing_gets_no_name(rig: ImportRig, tmp_path: Path) -> None:
    """R-016: perfect structure and dead weights; the probe decides."""
    folder = copy_of(SMALL, tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff\x7f" * ((len(data) - start) // 2)
    (folder / "model.safetensors").write_bytes(bytes(data))
    ended = await rig.import_folder(folder, "dead")
    assert ended.state == job_pb2.JOB_STATE_FAILED
    with pytest.raises(UnknownModel):
        await rig.catalog.resolve("dead")


async def test_plans_tell_bytes_and_facts_without_making_a_job(rig: ImportRig) -> None:
    """IMP-2: what would happen, before it happens."""
    spec = importer_pb2.ImportSpec(upload=rig.upload(SMALL), name="planned")
    plan = (await call(rig.stub.PlanImport, importer_pb2.PlanImportRequest(spec=spec), timeout_s=CALL_TIMEOUT_S)).plan
    facts = {item.name: item.value for item in plan.items}
    assert (facts["architecture"], facts["parameters"], facts["licence"]) == ("qwen2", "10759424", "Apache-2.0")
    assert plan.read_bytes > 21_000_000 and not plan.refusals
    digest = succeeded(await rig.import_folder(SMALL, "planned"))
    request = importer_pb2.PlanQuantizeRequest(spec=importer_pb2.QuantizeSpec(bundle=digest, scheme="Q4_K_M"))
    plan = (await call(rig.stub.PlanQuantize, request, timeout_s=CALL_TIMEOUT_S)).plan
    assert 5_000_000 < plan.write_bytes < 9_000_000
    request.spec.scheme = "Q3_X"
    refused = (await call(rig.stub.PlanQuantize, request, timeout_s=CALL_TIMEOUT_S)).plan
    assert [refusal.reason for refusal in refused.refusals] == ["UNSUPPORTED_QUANTIZATION"]


def probe_ids(store: S3Store, bundle: str) -> list[list[int]]:
    """The tokens of a bundle's recorded probe."""
    name = next(store.list_refs(f"probes/{bundle.removeprefix('sha256:')}/"))
    return [result["ids"] for result in store.get_manifest(store.get_ref(name) or "").config["results"]]


def copy_of(model: Path, folder: Path) -> Path:
    """A writable copy of a model folder."""
    return Path(shutil.copytree(model, folder / "model", copy_function=shutil.copyfile))
