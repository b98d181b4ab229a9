"""Plans: facts from small files, refusals instead of surprises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.importer.plan import plan_import, plan_quantize
from services.importer.sources import Progress, Snapshot, SourceFile, choose_files, place
from smeltkit.errors import UnsupportedQuantization
from smeltkit.ids import digest_file
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import Bundle, media_type_of
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.quantization import planned_size_bytes
from smeltkit.testing.tiny_models import write_tiny_model


class FolderSource:
    """A folder as a source; remembers what was fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched = folder, set[str]()

    def snapshot(self) -> Snapshot:
        """The files of the folder."""
        found = [SourceFile(path=path.name, size_bytes=path.stat().st_size) for path in sorted(self.folder.iterdir())]
        files, ignored = choose_files(found)
        return Snapshot(origin="test", files=files, ignored=ignored)

    def fetch(self, snapshot: Snapshot, names: object, folder: Path, progress: Progress) -> None:
        """Places files."""
        for name in names:  # type: ignore[attr-defined]
            self.fetched.add(name)
            place(self.folder / snapshot.files[name].path, folder / name)


def bundle_manifest(folder: Path) -> Manifest:
    """The manifest that a bundle folder would get."""
    lineage = Lineage(operation="import", code_revision="test")
    bundle = Bundle.from_folder(folder, lineage=lineage, licence="MIT")
    layers = []
    for path in bundle.write_parts(folder):
        with path.open("rb") as file:
            digest, size_bytes = digest_file(file)
        layers.append(
            Descriptor(media_type=media_type_of(path.name), digest=digest, size_bytes=size_bytes, path=path.name)
        )
    return Manifest(artifact_type=BUNDLE_TYPE, config=bundle.to_config(), layers=tuple(layers))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_import_plan_reads_no_weights(tmp_path: Path, work: Path) -> None:
    """IMP-2: architecture, size, task and stop set before one weight byte moves."""
    config = write_tiny_model(tmp_path / "model", "qwen3")
    source = FolderSource(tmp_path / "model")
    plan = plan_import(source, source.snapshot(), work)
    assert "model.safetensors" not in source.fetched
    assert (plan.items["architecture"], plan.items["parameters"]) == ("qwen3", str(config.parameters))
    assert (plan.items["task"], plan.items["stop_ids"], plan.items["licence"]) == ("chat", "381, 383", "Apache-2.0")
    assert not plan.refusals and plan.read_bytes == source.snapshot().size_bytes


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "BUNDLE_INCOMPLETE"),
        ("tokenizer.json", None, "BUNDLE_INCOMPLETE"),
        ("config.json", b"{", "BAD_MODEL_CONFIG"),
        ("config.json", b'{"model_type": "mamba"}', "UNSUPPORTED_ARCHITECTURE"),
        ("tokenizer.json", b"{}", "BAD_TOKENIZER"),
        ("chat_template.jinja", b"\xff\xfe", "BAD_TEMPLATE"),
    ],
)
def test_broken_side_file_is_a_refusal(
    name: str, content: bytes | None, reason: str, tmp_path: Path, work: Path
) -> None:
    """And the plan is still an answer."""
    write_tiny_model(tmp_path / "model", "qwen3")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "model" / name).write_bytes(content)
    source = FolderSource(tmp_path / "model")
    plan = plan_import(source, source.snapshot(), work)
    assert [refusal.reason() for refusal in plan.refusals] == [reason]
    with pytest.raises(type(plan.refusals[0])):
        plan.check()


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, work: Path) -> None:
    """Ids without a row in the embedding."""
    write_tiny_model(tmp_path / "model", "qwen3")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 300, "eos_token_id": 1}))
    source = FolderSource(tmp_path / "model")
    assert [error.reason() for error in plan_import(source, source.snapshot(), work).refusals] == ["BAD_TOKENIZER"]


def test_quantize_plan_forecasts_bytes_and_steps(tmp_path: Path) -> None:
    """Fewer bits, fewer bytes; conversion only where it is needed."""
    write_tiny_model(tmp_path, "qwen3", hidden_size=256, intermediate_size=1280)
    manifest = bundle_manifest(tmp_path)
    sizes = [
        plan_quantize(manifest, scheme).write_bytes for scheme in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
    ]
    assert sizes == sorted(sizes, reverse=True)
    beside = sum(layer.size_bytes for layer in manifest.layers if not layer.path.endswith(".safetensors"))
    assert sizes[0] - planned_size_bytes(Bundle.from_manifest(manifest).config, "F16") > beside
    assert "convert to GGUF BF16" in plan_quantize(manifest, "Q8_0").steps
    assert plan_quantize(manifest, "BF16").refusals == ()


def test_quantize_plan_refuses_lost_bits_unknown_schemes_and_odd_rows(tmp_path: Path) -> None:
    """R-020 and IMP-16: each with its reason."""
    write_tiny_model(tmp_path, "qwen3", intermediate_size=100)
    manifest = bundle_manifest(tmp_path)
    for scheme, match in (("Q4_K_M", "divisible"), ("Q9_X", "known are")):
        with pytest.raises(UnsupportedQuantization, match=match):
            plan_quantize(manifest, scheme).check()
    convert_to_gguf(tmp_path, tmp_path / "model.gguf", dtype="F16")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedQuantization, match="already"):
        plan_quantize(bundle_manifest(tmp_path), "F16").check()
