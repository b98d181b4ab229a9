"""The structure of a stored bundle, held against itself: bytes, description, tensors, tokenizer.

Structure alone never passes a check: the probe comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.importer.sizes import claim_size
from smeltkit.blobs.store import Store
from smeltkit.errors import BadManifest, BadTokenizer
from smeltkit.manifest import REPORT_TYPE, Manifest
from smeltkit.ml import reference_corpus
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.tokenizer import Tokenizer


def check_structure(
    store: Store, manifest: Manifest, folder: Path, progress: Callable[[int], None]
) -> list[dict[str, str]]:
    """What was checked and found, one entry a check; the first fault is raised as its own error.

    Every file is read from the store into `folder` and verified; `progress` gets bytes read.
    """
    described, done = Bundle.from_manifest(manifest), 0
    for layer in manifest.layers:
        store.fetch(layer.digest, folder / layer.path)
        done += layer.size_bytes
        progress(done)
    found = Bundle.from_folder(folder, lineage=described.lineage, licence=described.licence)
    if found != described:
        raise BadManifest(f"{manifest.digest} describes another bundle than its files make up; import the model again")
    spelled = check_round_trip(Tokenizer.from_file(folder / "tokenizer.json"))
    claim = claim_size(store, manifest, described.lineage.inputs)
    size = [] if claim is None else [{"check": "size", "found": str(claim)}]
    return [
        *size,
        {"check": "bytes", "found": f"{len(manifest.layers)} files of {manifest.size_bytes} bytes have their digests"},
        {"check": "parts", "found": "weights, config, tokenizer, template, contract, lineage and licence are there"},
        {
            "check": "tensors",
            "found": f"{len(found.config.tensors())} tensors, none missing, none extra, shapes declared",
        },
        {"check": "contract", "found": f"stop ids {list(found.contract.stop_ids)} as the files declare them"},
        {"check": "tokenizer", "found": f"{spelled} texts come back from their ids byte for byte"},
    ]


def check_round_trip(tokenizer: Tokenizer) -> int:
    """Encodes and decodes the reference corpus; how many texts came back. BadTokenizer names one that did not."""
    corpus = reference_corpus.texts()
    for text in corpus:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            raise BadTokenizer(f"tokenizer.json turns {text!r} into {back!r}; code would be altered")
    return len(corpus)


def to_report(bundle: str, checks: list[dict[str, str]], probe: str) -> Manifest:
    """The check as an artifact about the bundle."""
    config: dict[str, Any] = {"kind": "check", "bundle": bundle, "checks": checks, "probe": probe}
    return Manifest(artifact_type=REPORT_TYPE, config=config, subject=bundle)
