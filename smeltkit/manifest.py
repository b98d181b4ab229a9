"""Artifact manifests: canonical JSON over content-addressed files. The sha256 of the bytes is the artifact's identity.

Shaped like an OCI image manifest (schemaVersion 2, config, layers, subject) so that export to an OCI registry is a
copy. The config is inlined as `config` JSON: it is small, and one read then tells all about an artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from smeltkit import limits
from smeltkit.errors import BadDigest, BadManifest
from smeltkit.ids import check_digest, digest_bytes

BUNDLE_TYPE = "application/vnd.smelt.bundle.v1+json"
DATASET_TYPE = "application/vnd.smelt.dataset.v1+json"
REPORT_TYPE = "application/vnd.smelt.report.v1+json"
REFERENCE_TYPE = "application/vnd.smelt.reference.v1+json"
JUDGEMENT_TYPE = "application/vnd.smelt.judgement.v1+json"
PROBE_TYPE = "application/vnd.smelt.probe.v1+json"
RUN_TYPE = "application/vnd.smelt.run.v1+json"
TOGETHER_TYPE = "application/vnd.smelt.together.v1+json"
PAUSED_TYPE = "application/vnd.smelt.paused-run.v1+json"

_KEYS = frozenset({"schemaVersion", "artifactType", "config", "layers", "subject"})


def canonical_json(value: Any) -> bytes:
    """`value` as JSON with sorted keys, no white space, ASCII only: equal values give equal bytes. No NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def check_path(path: str) -> str:
    """`path` itself if it stays inside its folder: relative, no empty part, no `..`, no backslash; else BadManifest."""
    parts = PurePosixPath(path).parts
    if not path or "\\" in path or "\0" in path or path.startswith("/") or ".." in parts or "/".join(parts) != path:
        raise BadManifest(f"path {path!r} leaves its folder or is not normalized; use a relative path such as a/b.json")
    return path


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """One file of an artifact: media type, digest, size in bytes and relative path."""

    media_type: str
    digest: str
    size_bytes: int
    path: str

    def __post_init__(self) -> None:
        check_digest(self.digest)
        check_path(self.path)
        if self.size_bytes < 0:
            raise BadManifest(f"{self.path}: size {self.size_bytes} must not be negative")

    def to_dict(self) -> dict[str, Any]:
        """The descriptor as OCI JSON."""
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size_bytes,
            "annotations": {"org.cncf.model.filepath": self.path},
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Descriptor:
        """The descriptor of OCI JSON; KeyError or TypeError if it is malformed."""
        return cls(
            media_type=str(value["mediaType"]),
            digest=str(value["digest"]),
            size_bytes=int(value["size"]),
            path=str(value["annotations"]["org.cncf.model.filepath"]),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An artifact: its type, its own description (`config`, plain JSON values), its files, what it is about."""

    artifact_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Descriptor, ...] = ()
    subject: str = ""

    def __post_init__(self) -> None:
        paths = [layer.path for layer in self.layers]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise BadManifest(f"paths occur twice in one artifact: {', '.join(twice)}")
        if self.subject:
            check_digest(self.subject)

    def to_bytes(self) -> bytes:
        """The canonical bytes that are stored."""
        value: dict[str, Any] = {
            "schemaVersion": 2,
            "artifactType": self.artifact_type,
            "config": dict(self.config),
            "layers": [layer.to_dict() for layer in self.layers],
        }
        if self.subject:
            value["subject"] = {"digest": self.subject}
        return canonical_json(value)

    @property
    def digest(self) -> str:
        """The artifact's identity."""
        return digest_bytes(self.to_bytes())

    def expect(self, *artifact_types: str, remedy: str) -> None:
        """Raises BadManifest, ending in `remedy`, unless the artifact is of one of `artifact_types`."""
        if self.artifact_type not in artifact_types:
            is_, wanted = _kind(self.artifact_type), _kind(artifact_types[0])
            raise BadManifest(f"{self.digest} is of kind {is_}, not a {wanted}; {remedy}")

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the files."""
        return sum(layer.size_bytes for layer in self.layers)

    def layer(self, path: str) -> Descriptor | None:
        """The file at `path`, or None."""
        return next((layer for layer in self.layers if layer.path == path), None)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest of canonical bytes; BadManifest says what is wrong."""
        if len(data) > limits.MANIFEST_MAX_BYTES:
            raise BadManifest(f"manifest has {len(data)} bytes; at most {limits.MANIFEST_MAX_BYTES} are allowed")
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or value.get("schemaVersion") != 2 or set(value) - _KEYS:
                raise BadManifest("manifest must be a JSON object with schemaVersion 2 and no unknown key")
            subject = str(value["subject"]["digest"]) if "subject" in value else ""
            manifest = cls(
                artifact_type=str(value["artifactType"]),
                config=dict(value["config"]),
                layers=tuple(Descriptor.from_dict(layer) for layer in value["layers"]),
                subject=subject,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadDigest) as error:
            raise BadManifest(f"manifest is malformed: {error!r}") from error
        if manifest.to_bytes() != data:
            raise BadManifest("manifest is not in canonical form, so its digest would be ambiguous")
        return manifest


def _kind(artifact_type: str) -> str:
    """What people call an artifact type: "bundle" of "application/vnd.smelt.bundle.v1+json"."""
    return artifact_type.removeprefix("application/vnd.smelt.").partition(".")[0]
