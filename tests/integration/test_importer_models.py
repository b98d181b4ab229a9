"""Real models through the real importer: imported, probed, named, quantized, checked, inspected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from smeltkit.blobs.s3 import S3Store
from smeltkit.errors import BundleIncomplete, UnknownModel, UnsafeFile, UnsupportedArchitecture, UnsupportedQuantization
from smeltkit.manifest import PROBE_TYPE
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.quantization import planned_types
from smeltkit.rpc.channel import call
from smeltkit.testing.importing import CALL_TIMEOUT_S, ImportRig, succeeded
from smeltkit.testing.tiny_models import write_tiny_model

MODELS = Path(__file__).parents[3] / "shared" / "models"
SMALL = Path(__file__).parents[2] / "examples" / "models" / "ore-11m"


async def test_folder_becomes_a_named_and_probed_bundle(importing: ImportRig) -> None:
    """R-016, R-017: stored whole, generates in a clean process, and only then has a name."""
    digest = succeeded(await importing.import_folder(SMALL, "ore-small"))
    assert await importing.catalog.resolve("ore-small") == digest
    bundle = Bundle.from_manifest(importing.store.get_manifest(digest))
    assert (bundle.format, bundle.scheme, bundle.licence) == ("safetensors", "BF16", "Apache-2.0")
    assert bundle.config.parameters == 10_759_424
    names = list(importing.store.list_refs(f"probes/{digest.removeprefix('sha256:')}/"))
    record = importing.store.get_manifest(importing.store.get_ref(names[0]) or "")
    assert record.artifact_type == PROBE_TYPE and record.subject == digest
    assert all(result["ids"] for result in record.config["results"])


async def test_second_import_is_answered_from_the_cache(importing: ImportRig) -> None:
    """R-013: the same files give the same bundle at once, and the new name points at it."""
    first = succeeded(await importing.import_folder(SMALL, "cache-first"))
    again = await importing.import_folder(SMALL, "cache-second")
    assert again.is_cached and succeeded(again) == first
    assert await importing.catalog.resolve("cache-second") == first


@pytest.mark.parametrize("model", ["ore-11m-base", "ore-34m-instruct"])
async def test_shared_models_import_with_every_tensor(importing: ImportRig, model: str) -> None:
    """R-015, R-021: single file and shards alike; the tensors stored are those the config declares."""
    digest = succeeded(await importing.import_folder(MODELS / model, model))
    view = await call(importing.stub.Inspect, importer_pb2.InspectRequest(bundle=model), timeout_s=CALL_TIMEOUT_S)
    config = Bundle.from_manifest(importing.store.get_manifest(digest)).config
    declared = {spec.name: spec.shape for spec in config.tensors()}
    assert {tensor.name: tuple(tensor.shape) for tensor in view.tensors} == declared
    assert view.parameters == config.parameters
    assert view.artifact.digest == digest


@pytest.mark.parametrize("scheme", ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
async def test_requested_scheme_is_the_stored_scheme(importing: ImportRig, scheme: str, tmp_path: Path) -> None:
    """R-003, R-004: type by type as forecast, and the lineage names the source."""
    write_tiny_model(tmp_path / "tiny", "qwen3", is_chat=False, hidden_size=256, intermediate_size=1280)
    source = succeeded(await importing.import_folder(tmp_path / "tiny", "to-quantize"))
    digest = succeeded(await importing.quantize("to-quantize", scheme, f"tiny:{scheme.lower()}"))
    manifest = importing.store.get_manifest(digest)
    bundle = Bundle.from_manifest(manifest)
    assert (bundle.format, bundle.scheme, bundle.lineage.inputs) == ("gguf", scheme, (source,))
    weights = manifest.layer("model.gguf")
    assert weights is not None
    importing.store.fetch(weights.digest, tmp_path / "model.gguf")
    stored = {name: info.dtype for name, info in GgufFile.open(tmp_path / "model.gguf").tensors.items()}
    assert stored == planned_types(bundle.config, scheme)


async def test_quantized_bundle_cannot_be_quantized_again(importing: ImportRig) -> None:
    """R-020: lost bits do not come back, so the second step is refused before it starts."""
    await importing.import_folder(SMALL, "once")
    succeeded(await importing.quantize("once", "Q8_0", "once:q8_0"))
    with pytest.raises(UnsupportedQuantization, match="Q8_0"):
        await importing.start_quantize("once:q8_0", "Q4_K_M")


async def test_check_of_a_quantized_bundle_says_how_much_smaller_it_is(importing: ImportRig) -> None:
    """R-028: bytes of the weights as stored, and those of the source, each by digest."""
    source = succeeded(await importing.import_folder(SMALL, "to-shrink"))
    made = succeeded(await importing.quantize("to-shrink", "Q8_0", "to-shrink:q8_0"))
    request = importer_pb2.StartCheckRequest(bundle=made, request_id="check-size")
    job = (await call(importing.stub.StartCheck, request, timeout_s=CALL_TIMEOUT_S)).job
    (size, *_) = importing.store.get_manifest(succeeded(await importing.end(job))).config["checks"]
    weights = [
        importing.store.get_manifest(digest).layer(path)
        for digest, path in ((made, "model.gguf"), (source, "model.safetensors"))
    ]
    ours, theirs = [layer.size_bytes for layer in weights if layer is not None]
    assert size == {
        "check": "size",
        "found": f"{ours} bytes of weights, {ours / theirs:.3f} of the {theirs} of {source}",
    }


async def test_gguf_bundle_exports_and_imports_with_the_same_probe(importing: ImportRig, tmp_path: Path) -> None:
    """R-018, R-020: a GGUF file alone becomes a whole bundle again, and says the same."""
    await importing.import_folder(SMALL, "round-trip")
    first = succeeded(await importing.quantize("round-trip", "F16", "round-trip:f16"))
    folder = tmp_path / "exported"
    folder.mkdir()
    layer = importing.store.get_manifest(first).layer("model.gguf")
    assert layer is not None
    importing.store.fetch(layer.digest, folder / "ore.gguf")
    second = succeeded(await importing.import_folder(folder, "round-trip:back"))
    assert probe_ids(importing.store, second) == probe_ids(importing.store, first)
    assert Bundle.from_manifest(importing.store.get_manifest(second)).licence == "LicenseRef-unknown"


async def test_check_reports_structure_and_probe(importing: ImportRig) -> None:
    """R-016: the report of a check is about the bundle and holds the digest of a probe."""
    digest = succeeded(await importing.import_folder(SMALL, "to-check"))
    request = importer_pb2.StartCheckRequest(bundle="to-check", request_id="check-1")
    job = (await call(importing.stub.StartCheck, request, timeout_s=CALL_TIMEOUT_S)).job
    report = importing.store.get_manifest(succeeded(await importing.end(job)))
    assert report.subject == digest
    assert [entry["check"] for entry in report.config["checks"]] == [
        "bytes",
        "parts",
        "tensors",
        "contract",
        "tokenizer",
    ]
    assert importing.store.get_manifest(report.config["probe"]).artifact_type == PROBE_TYPE


async def test_check_finds_a_blob_that_rotted_in_the_store(importing: ImportRig, tmp_path: Path) -> None:
    """R-013: bytes are read again from the store; a manifest alone proves nothing."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "LICENSE").write_text("SPDX-License-Identifier: MIT\n")
    digest = succeeded(await importing.import_folder(folder, "to-rot"))
    layer = importing.store.get_manifest(digest).layer("LICENSE")
    assert layer is not None
    importing.store.delete_blob(layer.digest)
    job = (
        await call(
            importing.stub.StartCheck,
            importer_pb2.StartCheckRequest(bundle=digest, request_id="rot"),
            timeout_s=CALL_TIMEOUT_S,
        )
    ).job
    ended = await importing.end(job)
    assert ended.state == job_pb2.JOB_STATE_FAILED and ended.error.reason == "UNKNOWN_BLOB"


async def test_missing_tokenizer_is_refused_before_any_job(importing: ImportRig, tmp_path: Path) -> None:
    """R-017: the error names the file."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleIncomplete, match=r"tokenizer\.json"):
        await importing.import_folder(folder)


async def test_pickle_weights_are_refused(importing: ImportRig, tmp_path: Path) -> None:
    """R-030."""
    folder = copy_of(SMALL, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match=r"pytorch_model\.bin"):
        await importing.import_folder(folder)


async def test_unknown_architecture_is_refused(importing: ImportRig, tmp_path: Path) -> None:
    """The message lists the known ones."""
    folder = copy_of(SMALL, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}))
    with pytest.raises(UnsupportedArchitecture, match="qwen2"):
        await importing.import_folder(folder)


async def test_truncated_weights_fail_the_job_and_set_no_name(importing: ImportRig, tmp_path: Path) -> None:
    """Nothing half-written: no bundle, no name, and the reason names the file."""
    folder = copy_of(SMALL, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    before = set(importing.store.list_manifests())
    ended = await importing.import_folder(folder, "half")
    assert ended.error.reason == "BAD_SAFETENSORS" and "model.safetensors" in ended.error.message
    assert set(importing.store.list_manifests()) == before
    with pytest.raises(UnknownModel):
        await importing.catalog.resolve("half")


async def test_model_that_says_nothing_gets_no_name(importing: ImportRig, tmp_path: Path) -> None:
    """R-016: perfect structure and dead weights; the probe decides."""
    folder = copy_of(SMALL, tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff\x7f" * ((len(data) - start) // 2)
    (folder / "model.safetensors").write_bytes(bytes(data))
    ended = await importing.import_folder(folder, "dead")
    assert ended.state == job_pb2.JOB_STATE_FAILED and ended.error.reason in ("PROBE_FAILED", "TENSOR_MISMATCH")
    with pytest.raises(UnknownModel):
        await importing.catalog.resolve("dead")


async def test_plans_tell_bytes_and_facts_without_making_a_job(importing: ImportRig) -> None:
    """IMP-2: what would happen, before it happens."""
    spec = importer_pb2.ImportSpec(upload=importing.upload(SMALL), name="planned")
    plan = (
        await call(importing.stub.PlanImport, importer_pb2.PlanImportRequest(spec=spec), timeout_s=CALL_TIMEOUT_S)
    ).plan
    facts = {item.name: item.value for item in plan.items}
    assert (facts["architecture"], facts["parameters"], facts["licence"]) == ("qwen2", "10759424", "Apache-2.0")
    assert plan.read_bytes > 21_000_000 and not plan.refusals
    digest = succeeded(await importing.import_folder(SMALL, "planned"))
    request = importer_pb2.PlanQuantizeRequest(spec=importer_pb2.QuantizeSpec(bundle=digest, scheme="Q4_K_M"))
    plan = (await call(importing.stub.PlanQuantize, request, timeout_s=CALL_TIMEOUT_S)).plan
    assert 5_000_000 < plan.write_bytes < 9_000_000
    request.spec.scheme = "Q3_X"
    with pytest.raises(UnsupportedQuantization, match="known are F32"):
        await call(importing.stub.PlanQuantize, request, timeout_s=CALL_TIMEOUT_S)


def probe_ids(store: S3Store, bundle: str) -> list[list[int]]:
    """The tokens of a bundle's recorded probe."""
    name = next(store.list_refs(f"probes/{bundle.removeprefix('sha256:')}/"))
    return [result["ids"] for result in store.get_manifest(store.get_ref(name) or "").config["results"]]


def copy_of(model: Path, folder: Path) -> Path:
    """A writable copy of a model folder."""
    return Path(shutil.copytree(model, folder / "model", copy_function=shutil.copyfile))
