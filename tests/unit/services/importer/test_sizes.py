"""What is said about size: stored bytes against the stored source, each by digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from services.importer.sizes import claim_size, weights_bytes
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import UnknownBlob
from smeltkit.ids import digest_bytes
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import WEIGHTS_MEDIA_TYPE


def put_bundle(store: LocalStore, *weights: bytes) -> Manifest:
    """A stored manifest of these weights and a configuration that counts for nothing."""
    layers = [Descriptor(media_type="x", digest=store.put_bytes(bytes(999)), size_bytes=999, path="config.json")]
    for index, data in enumerate(weights):
        digest = store.put_bytes(data)
        path = f"model-{index}.safetensors"
        layers.append(Descriptor(media_type=WEIGHTS_MEDIA_TYPE, digest=digest, size_bytes=len(data), path=path))
    manifest = Manifest(artifact_type=BUNDLE_TYPE, layers=tuple(layers))
    store.put_manifest(manifest)
    return manifest


def test_the_share_is_of_the_sources_stored_weights(tmp_path: Path) -> None:
    """R-028: all shards of the source, and weights only."""
    store = LocalStore(tmp_path)
    source, made = put_bundle(store, b"s" * 600, b"t" * 400), put_bundle(store, b"m" * 350)
    claim = claim_size(store, made, (source.digest,))
    assert claim is not None
    assert (claim.stored_bytes, claim.source_bytes) == (350, 1000)
    assert str(claim) == f"350 bytes of weights, 0.350 of the 1000 of {source.digest}"


def test_what_a_manifest_says_of_itself_proves_nothing(tmp_path: Path) -> None:
    """R-028: a manifest that claims fewer bytes than are stored changes no claim."""
    store = LocalStore(tmp_path)
    source, made = put_bundle(store, b"s" * 1000), put_bundle(store, b"m" * 1000)
    boast = replace(made, layers=tuple(replace(layer, size_bytes=1) for layer in made.layers))
    claim = claim_size(store, boast, (source.digest,))
    assert claim is not None and claim.stored_bytes == 1000


def test_without_one_stored_source_nothing_is_claimed(tmp_path: Path) -> None:
    """R-028."""
    store = LocalStore(tmp_path)
    made = put_bundle(store, b"m")
    assert claim_size(store, made, ()) is None
    assert claim_size(store, made, (digest_bytes(b"gone"),)) is None
    assert claim_size(store, made, (made.digest, made.digest)) is None


def test_a_weight_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """R-028."""
    store = LocalStore(tmp_path)
    made = put_bundle(store, b"m" * 5)
    assert weights_bytes(store, made) == 5
    store.delete_blob(digest_bytes(b"m" * 5))
    with pytest.raises(UnknownBlob, match="cannot be told"):
        weights_bytes(store, made)
