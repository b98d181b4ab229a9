"""Manifests as the message that clients see."""

from __future__ import annotations

from smelt.artifact.v1 import artifact_pb2

from smeltkit.manifest import Manifest, canonical_json


def to_artifact(manifest: Manifest) -> artifact_pb2.Artifact:
    """The manifest as a message."""
    layers = (
        artifact_pb2.Descriptor(
            media_type=layer.media_type, digest=layer.digest, size_bytes=layer.size_bytes, path=layer.path
        )
        for layer in manifest.layers
    )
    return artifact_pb2.Artifact(
        digest=manifest.digest,
        artifact_type=manifest.artifact_type,
        config_json=canonical_json(dict(manifest.config)).decode(),
        layers=layers,
        size_bytes=manifest.size_bytes,
        subject=manifest.subject,
    )
