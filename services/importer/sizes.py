"""How large a bundle is against the one that it was made from: bytes that the store holds, each file by its digest.

A file is never held against itself, a forecast or what a manifest says of it: those cannot show that nothing shrank.
"""

from __future__ import annotations

from dataclasses import dataclass

from smeltkit.blobs.store import Store
from smeltkit.errors import UnknownBlob
from smeltkit.manifest import Manifest
from smeltkit.ml.bundle import WEIGHTS_MEDIA_TYPE


@dataclass(frozen=True, kw_only=True)
class SizeClaim:
    """Stored bytes of the weights of a bundle and of its source."""

    source: str
    """Digest of the source bundle."""
    stored_bytes: int
    source_bytes: int

    def __str__(self) -> str:
        share = self.stored_bytes / self.source_bytes
        return f"{self.stored_bytes} bytes of weights, {share:.3f} of the {self.source_bytes} of {self.source}"


def claim_size(store: Store, manifest: Manifest, inputs: tuple[str, ...]) -> SizeClaim | None:
    """The claim about a bundle that was made from exactly one stored bundle, else None: then nothing is claimed.

    UnknownBlob if a file of either is gone.
    """
    if len(inputs) != 1 or not store.has_manifest(inputs[0]):
        return None
    source = store.get_manifest(inputs[0])
    return SizeClaim(
        source=inputs[0], stored_bytes=weights_bytes(store, manifest), source_bytes=weights_bytes(store, source)
    )


def weights_bytes(store: Store, manifest: Manifest) -> int:
    """Bytes that the store holds of the weights of a bundle; a file under two names counts once."""
    digests = {layer.digest: layer.path for layer in manifest.layers if layer.media_type == WEIGHTS_MEDIA_TYPE}
    total = 0
    for digest, path in digests.items():
        size_bytes = store.size(digest)
        if size_bytes is None:
            raise UnknownBlob(f"{path} ({digest}) of {manifest.digest} is not stored, so its size cannot be told")
        total += size_bytes
    return total
