"""Bundles are built here, blocking, in a folder of their own: from a source, or from another bundle by quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from services.importer import convert, spec
from services.importer.quantize import quantize
from services.importer.sources import Progress, Snapshot, Source
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.publish import UNKNOWN_LICENCE, store_bundle
from smeltkit.blobs.store import Store
from smeltkit.manifest import Manifest
from smeltkit.ml.bundle import GGUF_FILE, Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.quantization import SCHEMES, planned_size_bytes
from smeltkit.revision import code_revision
from smeltkit.telemetry import names, span


class Phases(Protocol):
    """Gives the function that tells how much of a named phase is done."""

    def phase(self, name: str, total: int, unit: str = "bytes") -> Progress:
        """A function to be called with the amount done; it may raise to stop the work."""


def build_import(store: Store, source: Source, snapshot: Snapshot, folder: Path, phases: Phases) -> Manifest:
    """Fetches a snapshot into the empty `folder`, checks it as a whole, stores it; the bundle's manifest."""
    with span("smelt.importer.fetch"):
        source.fetch(snapshot, snapshot.files, folder, phases.phase("fetch", snapshot.size_bytes))
    with span("smelt.importer.check"):
        if GGUF_FILE in snapshot.files:
            convert.complete_gguf(folder)
        bundle = Bundle.from_folder(folder, lineage=spec.import_lineage(snapshot), licence=UNKNOWN_LICENCE)
    with span("smelt.importer.store"):
        return store_bundle(store, folder, bundle, phases.phase("store", snapshot.size_bytes))


def build_quantized(
    store: Store, cache: NodeCache, manifest: Manifest, scheme: str, folder: Path, phases: Phases, *, threads: int
) -> Manifest:
    """Makes a GGUF bundle of `scheme` from a stored one, in the empty `folder`, and stores it; its manifest."""
    bundle, float_file, result = Bundle.from_manifest(manifest), folder / "float.gguf", folder / "bundle"
    is_float = SCHEMES[scheme].is_float and bundle.format == "safetensors"
    result.mkdir()
    phases.phase("fetch", manifest.size_bytes)(0)
    with cache.materialize(manifest) as source, span("smelt.importer.convert"):
        tell = phases.phase("convert", len(bundle.config.tensors()), "tensors")
        dtype = scheme if is_float else convert.float_type(bundle)
        convert.to_gguf(bundle, source, float_file, dtype, lambda done, _: tell(done))
        convert.copy_side_files(source, result)
    size_bytes = planned_size_bytes(bundle.config, scheme)
    if is_float:
        float_file.rename(result / GGUF_FILE)
    else:
        with span("smelt.importer.quantize", **{names.SCHEME: scheme}):
            progress = phases.phase("quantize", size_bytes)
            quantize(float_file, result / GGUF_FILE, bundle.config, scheme, threads=threads, progress=progress)
        float_file.unlink()
    lineage = Lineage(
        operation="quantize",
        inputs=(manifest.digest,),
        parameters={"scheme": scheme},
        code_revision=code_revision(),
        origin=bundle.lineage.origin,
    )
    with span("smelt.importer.store"):
        quantized = Bundle.from_folder(result, lineage=lineage, licence=bundle.licence)
        return store_bundle(store, result, quantized, phases.phase("store", size_bytes))
