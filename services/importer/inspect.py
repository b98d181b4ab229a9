"""One view of a stored bundle: its tensors, read from headers in the store without fetching the weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.manifest import Descriptor, Manifest
from smeltkit.ml import names
from smeltkit.ml.bundle import GGUF_FILE, Bundle
from smeltkit.ml.chat import ChatTemplate
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.model_files import TEMPLATE_FILE
from smeltkit.ml.safetensors_io import parse_header
from smeltkit.ml.weights import ROPE_TENSORS

EXAMPLE = "Write a function that adds two numbers."


@dataclass(frozen=True, kw_only=True)
class TensorView:
    """One stored tensor: canonical name, storage type, shape (outermost first), bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class BundleView:
    """What there is to see of a bundle."""

    manifest: Manifest
    bundle: Bundle
    tensors: tuple[TensorView, ...]
    rendered_example: str
    """The chat template with one user message; empty for a completion model."""


def view_of(store: Store, digest: str) -> BundleView:
    """The view of the bundle of this digest; UnknownArtifact, BadManifest, or a parser's error for damaged weights."""
    manifest = store.get_manifest(digest)
    bundle = Bundle.from_manifest(manifest)
    return BundleView(
        manifest=manifest,
        bundle=bundle,
        tensors=_tensors(store, manifest, bundle),
        rendered_example=_example(store, manifest),
    )


def tensors_in(store: Store, layer: Descriptor) -> dict[str, TensorView]:
    """The tensors of one weights file in the store, by the name in the file; reads its header only."""
    file, path = io.BufferedReader(_Blob(store, layer), limits.RANGE_READ_BYTES), Path(layer.path)
    if path.suffix == ".gguf":
        found = GgufFile.parse(file, layer.size_bytes, path).tensors.values()
        return {t.name: TensorView(name=t.name, dtype=t.dtype, shape=t.shape, size_bytes=t.size_bytes) for t in found}
    stored = parse_header(file, layer.size_bytes, path).values()
    return {t.name: TensorView(name=t.name, dtype=t.dtype, shape=t.shape, size_bytes=t.size_bytes) for t in stored}


def _tensors(store: Store, manifest: Manifest, bundle: Bundle) -> tuple[TensorView, ...]:
    rename: Callable[[str, str], str] = names.gguf_to_canonical if bundle.format == "gguf" else names.hf_to_canonical
    views = []
    for layer in manifest.layers:
        if layer.path == GGUF_FILE or layer.path.endswith(".safetensors"):
            for name, tensor in tensors_in(store, layer).items():
                canonical = name if name in ROPE_TENSORS else rename(bundle.config.architecture, name)
                views.append(
                    TensorView(name=canonical, dtype=tensor.dtype, shape=tensor.shape, size_bytes=tensor.size_bytes)
                )
    return tuple(views)


def _example(store: Store, manifest: Manifest) -> str:
    layer, contract = manifest.layer(TEMPLATE_FILE), manifest.config["contract"]
    if layer is None or layer.size_bytes == 0:
        return ""
    source = store.get_bytes(layer.digest, max_bytes=limits.TEMPLATE_MAX_BYTES).decode()
    template = ChatTemplate(source, contract["bos_text"], contract["eos_text"])
    return template.render([{"role": "user", "content": EXAMPLE}])


class _Blob(io.RawIOBase):
    """A stored blob as a file: reads are range reads."""

    def __init__(self, store: Store, layer: Descriptor) -> None:
        self._store, self._layer, self._offset = store, layer, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self._layer.size_bytes - self._offset)
        data = self._store.read_range(self._layer.digest, self._offset, size) if size > 0 else b""
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def tell(self) -> int:
        return self._offset
