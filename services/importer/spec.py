"""What a request names, as domain values: its source, and the keys under which results are found again."""

from __future__ import annotations

from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2

from services.importer.hub import HubRepository
from services.importer.sources import Snapshot, Source, UploadedFiles
from smeltkit import limits
from smeltkit.blobs.cache import NodeCache
from smeltkit.errors import BadRequest
from smeltkit.jobs.stages import StageCache
from smeltkit.manifest import Descriptor
from smeltkit.ml.lineage import Lineage
from smeltkit.revision import code_revision


def source_of(spec: importer_pb2.ImportSpec, cache: NodeCache) -> Source:
    """The source that an import names; BadRequest if it names none, or too many files."""
    kind = spec.WhichOneof("source")
    if kind == "hub":
        return HubRepository(spec.hub.repository, spec.hub.revision)
    if kind != "upload" or not 1 <= len(spec.upload.files) <= limits.UPLOAD_FILES_MAX:
        raise BadRequest(f"an import needs a hub repository, or 1 to {limits.UPLOAD_FILES_MAX} uploaded files")
    return UploadedFiles([to_descriptor(file) for file in spec.upload.files], spec.upload.origin, cache)


def to_descriptor(file: artifact_pb2.Descriptor) -> Descriptor:
    """A descriptor of a request, checked: BadDigest, BadManifest."""
    media_type = file.media_type or "application/octet-stream"
    return Descriptor(media_type=media_type, digest=file.digest, size_bytes=file.size_bytes, path=file.path)


def import_lineage(snapshot: Snapshot) -> Lineage:
    """The lineage of a bundle made from a snapshot; BadManifest if its origin tells of the caller's machine."""
    return Lineage(
        operation="import",
        inputs=snapshot.inputs,
        parameters=dict(snapshot.parameters),
        code_revision=code_revision(),
        origin=snapshot.origin,
    )


def import_key(stages: StageCache, snapshot: Snapshot) -> str:
    """Key of the import of a snapshot."""
    return stages.key("import", snapshot.parameters, snapshot.inputs)


def quantize_key(stages: StageCache, bundle: str, scheme: str) -> str:
    """Key of the quantization of a bundle."""
    return stages.key("quantize", {"scheme": scheme}, [bundle])
