"""A bundle folder becomes a stored bundle: files first, the manifest last, so that a manifest always has its files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from smeltkit.blobs.store import Store
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.ml.bundle import Bundle, check_complete, media_type_of

UNKNOWN_LICENCE = "LicenseRef-unknown"
"""Stands where neither a licence file nor the model card names a licence."""

Progress = Callable[[int], None]


def store_bundle(store: Store, folder: Path, bundle: Bundle, progress: Progress) -> Manifest:
    """Completes the folder, stores every file and then the manifest, and returns it.

    `progress` gets bytes stored. Safe to repeat: equal files are stored once.
    """
    done, layers = 0, []
    for path in bundle.write_parts(folder):
        digest, size_bytes = store.put_file(path, progress=partial(_add, progress, done))
        done += size_bytes
        progress(done)
        layers.append(
            Descriptor(media_type=media_type_of(path.name), digest=digest, size_bytes=size_bytes, path=path.name)
        )
    manifest = Manifest(artifact_type=BUNDLE_TYPE, config=bundle.to_config(), layers=tuple(layers))
    check_complete(manifest)
    store.put_manifest(manifest)
    return manifest


def _add(progress: Progress, before: int, count: int) -> None:
    progress(before + count)
