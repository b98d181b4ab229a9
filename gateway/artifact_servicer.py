"""ArtifactService: names from the catalogue, artifacts from the store, uploads and downloads by presigned URLs."""

from __future__ import annotations

import asyncio
from typing import Protocol

from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc

from gateway.references import References
from gateway.tenants.admission import Admission
from smeltkit.artifacts import to_artifact
from smeltkit.blobs.store import Presigner, Store
from smeltkit.catalog import Catalog, Entry
from smeltkit.rpc.context import TENANT, RpcContext


class ArtifactStore(Store, Presigner, Protocol):
    """A store that clients without credentials can reach by URLs; `smeltkit.blobs.s3.S3Store` is one."""


class ArtifactServicer(artifact_pb2_grpc.ArtifactServiceServicer):
    """Translates; the work is the catalogue's and the store's. Files never travel through gRPC."""

    def __init__(self, catalog: Catalog, store: ArtifactStore, admission: Admission | None = None) -> None:
        """`admission` holds uploads of tenants to their quotas."""
        self._catalog = catalog
        self._store = store
        self._admission = admission
        self._references = References(catalog, store)

    async def GetArtifact(
        self, request: artifact_pb2.GetArtifactRequest, context: RpcContext
    ) -> artifact_pb2.GetArtifactResponse:
        digest = await self._references.resolve(request.reference)
        manifest = await asyncio.to_thread(self._store.get_manifest, digest)
        return artifact_pb2.GetArtifactResponse(artifact=to_artifact(manifest))

    async def ListNames(
        self, request: artifact_pb2.ListNamesRequest, context: RpcContext
    ) -> artifact_pb2.ListNamesResponse:
        entries = await self._catalog.list(request.artifact_type)
        return artifact_pb2.ListNamesResponse(names=[_to_name(entry) for entry in entries])

    async def SetName(self, request: artifact_pb2.SetNameRequest, context: RpcContext) -> artifact_pb2.SetNameResponse:
        manifest = await asyncio.to_thread(self._store.get_manifest, request.digest)
        entry = await self._catalog.set(
            request.name, request.digest, manifest.artifact_type, manifest.size_bytes, request.expected_revision
        )
        return artifact_pb2.SetNameResponse(name=_to_name(entry))

    async def BeginUpload(
        self, request: artifact_pb2.BeginUploadRequest, context: RpcContext
    ) -> artifact_pb2.BeginUploadResponse:
        if (tenant := TENANT.get()) and self._admission:
            files = {file.digest: file.size_bytes for file in request.together}
            files[request.digest] = request.size_bytes
            sizes = await asyncio.gather(*(asyncio.to_thread(self._store.size, digest) for digest in files))
            fresh = {digest: files[digest] for digest, size in zip(files, sizes, strict=True) if size is None}
            await self._admission.reserve_upload(tenant, fresh)
        plan = await asyncio.to_thread(self._store.begin_upload, request.digest, request.size_bytes)
        parts = (
            artifact_pb2.UploadPart(
                number=part.number, url=part.url, offset_bytes=part.offset_bytes, size_bytes=part.size_bytes
            )
            for part in plan.parts
        )
        present = (artifact_pb2.UploadedPart(number=number, etag=etag) for number, etag in plan.present)
        return artifact_pb2.BeginUploadResponse(
            is_stored=plan.is_stored, upload_id=plan.upload_id, parts=parts, present=present
        )

    async def CompleteUpload(
        self, request: artifact_pb2.CompleteUploadRequest, context: RpcContext
    ) -> artifact_pb2.CompleteUploadResponse:
        parts = [(part.number, part.etag) for part in request.parts]
        await asyncio.to_thread(
            self._store.complete_upload, request.digest, request.size_bytes, request.upload_id, parts
        )
        return artifact_pb2.CompleteUploadResponse()

    async def GetDownload(
        self, request: artifact_pb2.GetDownloadRequest, context: RpcContext
    ) -> artifact_pb2.GetDownloadResponse:
        url = await asyncio.to_thread(self._store.presign_download, request.digest)
        size_bytes = await asyncio.to_thread(self._store.size, request.digest)
        return artifact_pb2.GetDownloadResponse(url=url, size_bytes=size_bytes or 0)


def _to_name(entry: Entry) -> artifact_pb2.Name:
    return artifact_pb2.Name(
        name=entry.name,
        digest=entry.digest,
        artifact_type=entry.artifact_type,
        revision=entry.revision,
        size_bytes=entry.size_bytes,
        tenant="" if TENANT.get() else entry.tenant,
    )
