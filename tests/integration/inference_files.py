"""Real bundles for tests of the inference service: complete folders, GGUF files of them, and stored artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import llama_cpp

from services.inference.llama import system_info
from smeltkit.blobs.store import Store
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import GGUF_FILE, Bundle, files_of, media_type_of
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.lineage import Lineage

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "examples" / "models" / "ore-11m"
LARGER = ROOT.parent / "shared" / "models" / "ore-34m-instruct"
LINEAGE = Lineage(operation="import", code_revision="test")
Q8_0 = 7


def basic_prompts(count: int) -> list[str]:
    """Prompts of the shipped suite: the beginnings of functions."""
    lines = (ROOT / "examples" / "data" / "basic.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def complete_folder(source: Path, folder: Path) -> Path:
    """A copy of a model folder with the parts that make it a bundle."""
    shutil.copytree(source, folder)
    Bundle.from_folder(folder, lineage=LINEAGE, licence="Apache-2.0").write_parts(folder)
    return folder


def f16_file(folder: Path) -> Path:
    """The folder's weights as an F16 GGUF file beside it."""
    path = folder.with_suffix(".f16.gguf")
    convert_to_gguf(folder, path, dtype="F16")
    return path


def q8_file(f16: Path) -> Path:
    """An F16 GGUF file quantized to Q8_0 by llama.cpp."""
    system_info()
    path, params = f16.with_suffix(".q8.gguf"), llama_cpp.llama_model_quantize_default_params()
    params.ftype = Q8_0
    assert llama_cpp.llama_model_quantize(str(f16).encode(), str(path).encode(), params) == 0
    return path


def gguf_folder(folder: Path, weights: Path, target: Path) -> Path:
    """A bundle folder that holds `weights` instead of safetensors."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    shutil.copy(weights, target / GGUF_FILE)
    return target


def store_bundle(store: Store, folder: Path) -> str:
    """Stores a complete folder as an artifact; its digest."""
    layers = []
    for path in files_of(folder):
        digest, size_bytes = store.put_file(path)
        media_type = media_type_of(path.name)
        layers.append(Descriptor(media_type=media_type, digest=digest, size_bytes=size_bytes, path=path.name))
    config = Bundle.from_folder(folder, lineage=LINEAGE, licence="Apache-2.0").to_config()
    return store.put_manifest(Manifest(artifact_type=BUNDLE_TYPE, config=config, layers=tuple(layers)))
