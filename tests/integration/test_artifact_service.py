"""ArtifactService over gRPC, on a real catalogue and a real S3 server: names, artifacts, uploads that prove bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from smelt.artifact.v1 import artifact_pb2, artifact_pb2_grpc

from gateway.artifact_servicer import ArtifactServicer
from gateway.cli.output import Output
from gateway.cli.session import Session
from gateway.cli.uploads import upload
from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus
from smeltkit.catalog import Catalog
from smeltkit.errors import BadDigest, DigestMismatch, RevisionConflict, UnknownArtifact, UnknownBlob, UnknownModel
from smeltkit.ids import digest_bytes
from smeltkit.manifest import BUNDLE_TYPE, Descriptor, Manifest
from smeltkit.rpc.channel import call, open_channel
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.testing.s3 import S3Server, fresh_store

PART_BYTES = 5 << 20
CONTENT = b"weights of a model " * 600_000


@pytest.fixture
def parted_store(s3: S3Server, tmp_path: Path) -> S3Store:
    """A store that uploads in parts of 5 MiB."""
    return fresh_store(s3, tmp_path / "state", part_bytes=PART_BYTES)


@pytest.fixture
async def channel(bus: Bus, parted_store: S3Store) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a served ArtifactService."""
    host = ServiceHost("gateway", RpcConfig())
    host.add(
        "smelt.artifact.v1.ArtifactService",
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server,
        ArtifactServicer(Catalog(bus), parted_store),
    )
    await host.start()
    async with open_channel(host.address) as opened:
        yield opened
    await host.stop()


@pytest.fixture
def service(channel: grpc.aio.Channel) -> artifact_pb2_grpc.ArtifactServiceStub:
    """A client of the service."""
    return artifact_pb2_grpc.ArtifactServiceStub(channel)


async def _begin(service: Any, content: bytes, digest: str = "") -> artifact_pb2.BeginUploadResponse:
    request = artifact_pb2.BeginUploadRequest(digest=digest or digest_bytes(content), size_bytes=len(content))
    answer: artifact_pb2.BeginUploadResponse = await call(service.BeginUpload, request, timeout_s=10)
    return answer


async def _send(client: httpx.AsyncClient, part: artifact_pb2.UploadPart, content: bytes) -> artifact_pb2.UploadedPart:
    body = content[part.offset_bytes : part.offset_bytes + part.size_bytes]
    answer = await client.put(part.url, content=body)
    answer.raise_for_status()
    return artifact_pb2.UploadedPart(number=part.number, etag=answer.headers["etag"].strip('"'))


async def _complete(service: Any, content: bytes, digest: str, upload_id: str, parts: Any) -> None:
    request = artifact_pb2.CompleteUploadRequest(
        digest=digest, size_bytes=len(content), upload_id=upload_id, parts=sorted(parts, key=lambda part: part.number)
    )
    await call(service.CompleteUpload, request, timeout_s=30)


async def test_interrupted_upload_sends_only_the_missing_parts(service: Any, parted_store: S3Store) -> None:
    """A second try lists what arrived; the finished blob is read back and is whole."""
    first = await _begin(service, CONTENT)
    assert len(first.parts) == 3 and not first.is_stored
    async with httpx.AsyncClient(trust_env=False) as client:
        await _send(client, first.parts[1], CONTENT)
        second = await _begin(service, CONTENT)
        assert [part.number for part in second.parts] == [1, 3]
        sent = [await _send(client, part, CONTENT) for part in second.parts]
    await _complete(service, CONTENT, digest_bytes(CONTENT), second.upload_id, [*sent, *second.present])
    assert parted_store.get_bytes(digest_bytes(CONTENT)) == CONTENT
    assert (await _begin(service, CONTENT)).is_stored


async def test_upload_with_other_bytes_than_its_digest_is_not_kept(service: Any, parted_store: S3Store) -> None:
    """The store's own checksums are not trusted: what was sent is hashed again."""
    digest = digest_bytes(b"what was announced")
    begun = await _begin(service, b"something else", digest)
    async with httpx.AsyncClient(trust_env=False) as client:
        sent = [await _send(client, part, b"something else") for part in begun.parts]
    with pytest.raises(DigestMismatch):
        await _complete(service, b"something else", digest, begun.upload_id, sent)
    assert parted_store.size(digest) is None


async def test_download_url_reads_the_blob(service: Any, parted_store: S3Store) -> None:
    """A client without credentials gets the bytes."""
    digest = parted_store.put_bytes(b"a report")
    answer = await call(service.GetDownload, artifact_pb2.GetDownloadRequest(digest=digest), timeout_s=10)
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(answer.url)).content == b"a report"
    assert answer.size_bytes == 8


async def test_artifact_is_found_by_name_and_by_digest(service: Any, parted_store: S3Store) -> None:
    """SetName points at a stored artifact; both references answer the same."""
    layer = Descriptor(
        media_type="text/plain", digest=parted_store.put_bytes(b"hello"), size_bytes=5, path="docs/hello.txt"
    )
    digest = parted_store.put_manifest(Manifest(artifact_type=BUNDLE_TYPE, config={"b": 1, "a": 2}, layers=(layer,)))
    named = await call(service.SetName, artifact_pb2.SetNameRequest(name="ore", digest=digest), timeout_s=10)
    assert (named.name.name, named.name.size_bytes, named.name.artifact_type) == ("ore:latest", 5, BUNDLE_TYPE)
    for reference in ("ore", digest):
        request = artifact_pb2.GetArtifactRequest(reference=reference)
        artifact = (await call(service.GetArtifact, request, timeout_s=10)).artifact
        assert (artifact.digest, artifact.config_json) == (digest, '{"a":2,"b":1}')
        assert [(found.path, found.size_bytes) for found in artifact.layers] == [("docs/hello.txt", 5)]
    listed = await call(service.ListNames, artifact_pb2.ListNamesRequest(artifact_type=BUNDLE_TYPE), timeout_s=10)
    assert {name.name: name.digest for name in listed.names}["ore:latest"] == digest
    assert {name.artifact_type for name in listed.names} == {BUNDLE_TYPE}
    other = await call(service.ListNames, artifact_pb2.ListNamesRequest(artifact_type="other"), timeout_s=10)
    assert not other.names


async def test_name_changed_meanwhile_is_a_conflict(service: Any, parted_store: S3Store) -> None:
    """Compare-and-swap: who read an older revision does not overwrite."""
    manifest = Manifest(artifact_type=BUNDLE_TYPE, config={"n": 1})
    request = artifact_pb2.SetNameRequest(name="ore", digest=parted_store.put_manifest(manifest))
    first = (await call(service.SetName, request, timeout_s=10)).name
    request.digest = parted_store.put_manifest(replace(manifest, config={"n": 2}))
    request.expected_revision = first.revision
    await call(service.SetName, request, timeout_s=10)
    with pytest.raises(RevisionConflict):
        await call(service.SetName, request, timeout_s=10)


@pytest.mark.parametrize(
    "method,request_message,error",
    [
        ("GetArtifact", artifact_pb2.GetArtifactRequest(reference="nobody"), UnknownModel),
        ("GetArtifact", artifact_pb2.GetArtifactRequest(reference=digest_bytes(b"none")), UnknownArtifact),
        ("GetDownload", artifact_pb2.GetDownloadRequest(digest=digest_bytes(b"none")), UnknownBlob),
        ("SetName", artifact_pb2.SetNameRequest(name="ore", digest=digest_bytes(b"none")), UnknownArtifact),
        ("BeginUpload", artifact_pb2.BeginUploadRequest(digest="md5:1", size_bytes=1), BadDigest),
        ("GetDownload", artifact_pb2.GetDownloadRequest(digest=""), BadDigest),
    ],
)
async def test_bad_request_gives_its_typed_error(
    service: Any, method: str, request_message: Any, error: type[Exception]
) -> None:
    """Unknown names, unknown digests and malformed digests are told apart."""
    with pytest.raises(error):
        await call(getattr(service, method), request_message, timeout_s=10)


async def test_command_line_uploads_a_file_in_parts_and_only_once(
    channel: grpc.aio.Channel, parted_store: S3Store, tmp_path: Path
) -> None:
    """What `smelt import` sends arrives whole; a second time nothing is sent, and an empty file is a blob too."""
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    (tmp_path / "empty.txt").write_bytes(b"")
    session = Session(channel, Output())
    paths = [tmp_path / "model.safetensors", tmp_path / "empty.txt"]
    stored = await upload(session, paths)
    assert [(file.path, file.digest, file.size_bytes) for file in stored] == [
        ("model.safetensors", digest_bytes(CONTENT), len(CONTENT)),
        ("empty.txt", digest_bytes(b""), 0),
    ]
    assert parted_store.get_bytes(digest_bytes(CONTENT)) == CONTENT
    assert await upload(session, paths) == stored
