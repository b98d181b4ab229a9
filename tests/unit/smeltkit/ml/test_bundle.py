"""A bundle is whole or it is none: every part is asked for, held against the others, and named when it is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from smeltkit.errors import (
    BadManifest,
    BadTemplate,
    BadTokenizer,
    BundleIncomplete,
    SmeltError,
    TensorMismatch,
    UnsafeFile,
)
from smeltkit.ids import digest_file
from smeltkit.manifest import BUNDLE_TYPE, REPORT_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import REQUIRED_FILES, Bundle, check_complete, files_of, media_type_of
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.licence import licence_of
from smeltkit.ml.lineage import Lineage

ORE = Path(__file__).parents[4] / "examples/models/ore-11m"
LINEAGE = Lineage(operation="import", code_revision="0.1.0", origin="hf://org/ore-11m@0a1b2c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the shipped model, weights hard-linked."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in ORE.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).hardlink_to(path)
        else:
            shutil.copyfile(path, copy / path.name)
    return copy


def _manifest(bundle: Bundle, files: list[Path]) -> Manifest:
    layers = []
    for path in files:
        with path.open("rb") as file:
            digest, size_bytes = digest_file(file)
        media_type = media_type_of(path.name)
        layers.append(Descriptor(media_type=media_type, digest=digest, size_bytes=size_bytes, path=path.name))
    return Manifest(artifact_type=BUNDLE_TYPE, config=bundle.to_config(), layers=tuple(layers))


def test_shipped_model_is_a_bundle_that_survives_its_manifest(folder: Path) -> None:
    """R-017."""
    bundle = Bundle.from_folder(folder, lineage=LINEAGE)
    assert (bundle.format, bundle.scheme, bundle.licence) == ("safetensors", "BF16", "Apache-2.0")
    assert bundle.contract.stop_ids == (8186, 8188)
    assert bundle.config.parameters == 10_759_424
    files = bundle.write_parts(folder)
    assert {path.name for path in files} >= {*REQUIRED_FILES, "chat_template.jinja", "model.safetensors"}
    manifest = Manifest.from_bytes(_manifest(bundle, files).to_bytes())
    assert Bundle.from_manifest(manifest) == bundle
    assert Bundle.from_folder(folder, lineage=LINEAGE) == bundle, "writing the parts changed what they say"


def test_gguf_bundle_carries_the_same_parts(folder: Path) -> None:
    """R-017."""
    original = Bundle.from_folder(folder, lineage=LINEAGE)
    original.write_parts(folder)
    convert_to_gguf(folder, folder / "model.gguf", dtype="F16")
    (folder / "model.safetensors").unlink()
    bundle = Bundle.from_folder(folder, lineage=LINEAGE)
    assert (bundle.format, bundle.scheme) == ("gguf", "F16")
    assert (bundle.contract, bundle.config) == (original.contract, original.config)
    check_complete(_manifest(bundle, bundle.write_parts(folder)))


def test_writing_parts_leaves_hard_links_alone(folder: Path, tmp_path: Path) -> None:
    """A folder of a node's cache shares its files with the cache."""
    cached = tmp_path / "cached"
    cached.write_text("{}")
    (folder / "contract.json").hardlink_to(cached)
    Bundle.from_folder(folder, lineage=LINEAGE).write_parts(folder)
    assert cached.read_text() == "{}"
    assert (folder / "contract.json").read_text() != "{}"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("config.json", BundleIncomplete),
        ("tokenizer.json", BundleIncomplete),
        ("tokenizer_config.json", BundleIncomplete),
        ("model.safetensors", BundleIncomplete),
        ("LICENSE", BundleIncomplete),
    ],
)
def test_missing_part_is_named(folder: Path, name: str, error: type[SmeltError]) -> None:
    """R-017."""
    (folder / name).unlink()
    (folder / "README.md").unlink()
    with pytest.raises(error, match="licence" if name == "LICENSE" else name):
        Bundle.from_folder(folder, lineage=LINEAGE)


def test_lost_template_is_named_and_an_empty_one_declares_a_completion_model(folder: Path) -> None:
    """R-017."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadTemplate, match=r"chat_template\.jinja"):
        Bundle.from_folder(folder, lineage=LINEAGE)
    (folder / "chat_template.jinja").write_text("")
    assert Bundle.from_folder(folder, lineage=LINEAGE).contract.task == "completion"


def test_template_that_does_not_render_is_refused_at_import(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[5].content.nothing.there }}")
    with pytest.raises(BadTemplate, match="does not render"):
        Bundle.from_folder(folder, lineage=LINEAGE)


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 8000}))
    with pytest.raises(BadTokenizer, match="belongs to another model"):
        Bundle.from_folder(folder, lineage=LINEAGE)


def test_weights_that_do_not_fit_the_config_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12}))
    with pytest.raises(TensorMismatch):
        Bundle.from_folder(folder, lineage=LINEAGE)


@pytest.mark.parametrize("missing", [*REQUIRED_FILES, "chat_template.jinja", "model.safetensors"])
def test_manifest_without_a_part_is_no_bundle(folder: Path, missing: str) -> None:
    """R-017: what cannot be stored incomplete cannot be read incomplete either."""
    bundle = Bundle.from_folder(folder, lineage=LINEAGE)
    manifest = _manifest(bundle, bundle.write_parts(folder))
    layers = tuple(layer for layer in manifest.layers if layer.path != missing)
    with pytest.raises(BundleIncomplete, match=missing):
        Bundle.from_manifest(replace(manifest, layers=layers))


def test_every_shard_and_the_index_are_asked_for(folder: Path) -> None:
    bundle = Bundle.from_folder(folder, lineage=LINEAGE)
    manifest = _manifest(bundle, bundle.write_parts(folder))
    layers = tuple(
        replace(layer, path="model-00002-of-00003.safetensors") if layer.path == "model.safetensors" else layer
        for layer in manifest.layers
    )
    with pytest.raises(BundleIncomplete) as raised:
        check_complete(replace(manifest, layers=layers))
    assert raised.value.details["missing"].split(",") == [
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


def test_other_artifact_is_no_bundle() -> None:
    with pytest.raises(BadManifest, match="not a bundle"):
        Bundle.from_manifest(Manifest(artifact_type=REPORT_TYPE))


def test_link_in_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path)
    with pytest.raises(UnsafeFile, match=r"README\.md"):
        files_of(folder)


@pytest.mark.parametrize(
    "path", ["pytorch_model.bin", "modeling_x.py", "a/config.json", "../config.json", "model.ckpt"]
)
def test_file_that_no_bundle_has_gets_no_media_type(path: str) -> None:
    """R-030: pickle and code never become layers."""
    with pytest.raises(UnsafeFile):
        media_type_of(path)


def test_media_types_are_those_of_the_model_pack_specification() -> None:
    assert media_type_of("model.gguf") == media_type_of("model-00001-of-00002.safetensors")
    assert media_type_of("model.gguf") == "application/vnd.cncf.model.weight.v1.raw"
    assert media_type_of("tokenizer.json") == "application/vnd.cncf.model.weight.config.v1.raw"
    assert media_type_of("LICENSE") == "application/vnd.cncf.model.doc.v1.raw"


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("LICENSE", "SPDX-License-Identifier: MIT OR Apache-2.0\n", "MIT OR Apache-2.0"),
        ("LICENSE", "    Apache License\n   Version 2.0, January 2004\n", "Apache-2.0"),
        ("LICENSE", "MIT License\n\nCopyright", "MIT"),
        ("LICENSE", "Do what I say.", "LicenseRef-LICENSE"),
        ("README.md", "---\nlanguage: en\nlicense: apache-2.0\n---\n# x", "Apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: llama3.2\n---\n", "LicenseRef-llama3.2"),
        ("README.md", "license: mit is not declared in a header\n", None),
    ],
)
def test_licence_is_read_from_the_files(tmp_path: Path, name: str, text: str, licence: str | None) -> None:
    (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == licence
