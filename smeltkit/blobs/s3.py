"""A store in a bucket of any S3 server, through the minio client. The only file that imports it.

Relied upon: put, get, ranges, head, list, delete, multipart. Not relied upon: ETags as digests, conditional writes.
The client has no resumable uploads, so some of its internal calls are used; the contract tests hold them in place.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import urllib3
from minio import Minio
from minio.datatypes import Part as MinioPart
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from smeltkit import limits
from smeltkit.blobs import transfer
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.source import FileSlice, Source
from smeltkit.blobs.store import PartUrl, Progress, UploadPlan, blob_key
from smeltkit.config import PlatformConfig
from smeltkit.errors import (
    BadRequest,
    DigestMismatch,
    DiskFull,
    FileChanged,
    StoreDenied,
    StoreUnavailable,
    UnknownBlob,
)
from smeltkit.ids import digest_bytes

_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "ResourceNotFound"})
_DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"})
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_ALTERED = frozenset({"XAmzContentSHA256Mismatch", "BadDigest"})


class S3Store(ObjectStore):
    """Implements `Store` and `Presigner` on one bucket.

    `state_folder` remembers unfinished uploads of files larger than `part_bytes`, so that a later try sends the rest.
    """

    def __init__(
        self, config: PlatformConfig, *, state_folder: Path | None = None, part_bytes: int = limits.PART_BYTES
    ) -> None:
        self.config = config
        self._bucket = _Bucket(config)
        self._part_bytes = part_bytes
        self._state_folder = state_folder or Path(tempfile.gettempdir()) / f"smelt-uploads-{os.getuid()}"

    def ensure_bucket(self) -> None:
        """Creates the bucket unless it is there."""
        self._bucket.ensure()

    def takes_writes(self) -> bool:
        """Whether the server creates the bucket and takes an object: a server just started may list, but not write."""
        try:
            self._bucket.ensure()
            self._write("health", b"ok")
        except StoreUnavailable:
            return False
        return True

    def presign_download(self, digest: str) -> str:
        """See `Presigner.presign_download`."""
        if self.size(digest) is None:
            raise UnknownBlob(f"blob {digest} is not stored")
        return self._bucket.presign("GET", blob_key(digest), {})

    def begin_upload(self, digest: str, size_bytes: int) -> UploadPlan:
        """See `Presigner.begin_upload`; continues the newest unfinished upload of this digest."""
        key = blob_key(digest)
        if size_bytes < 0:
            raise BadRequest(f"size_bytes={size_bytes} must be 0 or more")
        if digest == digest_bytes(b""):
            self.put_bytes(b"")
        if self._size(key) == size_bytes:
            return UploadPlan(is_stored=True)
        pending = self._bucket.pending(key)
        upload_id = pending[-1] if pending else self._bucket.begin(key)
        found = self._bucket.present(key, upload_id) or {}
        ranges = list(transfer.part_ranges(size_bytes, transfer.part_bytes_of(size_bytes, self._part_bytes)))
        present = {
            number: found[number].etag
            for number, _, size in ranges
            if number in found and found[number].size_bytes == size
        }
        parts = tuple(
            PartUrl(
                number=number,
                offset_bytes=offset,
                size_bytes=size,
                url=self._bucket.presign("PUT", key, {"partNumber": str(number), "uploadId": upload_id}),
            )
            for number, offset, size in ranges
            if number not in present
        )
        return UploadPlan(is_stored=False, upload_id=upload_id, parts=parts, present=tuple(present.items()))

    def complete_upload(self, digest: str, size_bytes: int, upload_id: str, parts: Sequence[tuple[int, str]]) -> None:
        """See `Presigner.complete_upload`."""
        key = blob_key(digest)
        if self._size(key) != size_bytes:
            self._bucket.complete(key, upload_id, parts)
        hasher, done_bytes = hashlib.sha256(), 0
        while block := self.read_range(digest, done_bytes, 8 * limits.MIB):
            hasher.update(block)
            done_bytes += len(block)
        found = f"sha256:{hasher.hexdigest()}"
        if found != digest or done_bytes != size_bytes:
            self.delete_blob(digest)
            raise DigestMismatch(
                f"the {done_bytes} bytes sent have the digest {found}, not {digest} with {size_bytes} "
                "bytes; nothing was kept, upload the file again"
            )

    def abort_uploads(self, *, older_than_s: float = limits.UPLOAD_MAX_AGE_S) -> int:
        """Gives up uploads that began more than `older_than_s` seconds ago; how many."""
        return self._bucket.abort_older(datetime.now(UTC) - timedelta(seconds=older_than_s))

    def _write(self, key: str, data: bytes) -> None:
        self._bucket.put(key, data, len(data), digest_bytes(data), {})

    def _upload(self, key: str, source: Source, progress: Progress) -> None:
        if source.size_bytes <= self._part_bytes:
            self._bucket.put(key, source.slice(0, source.size_bytes), source.size_bytes, source.digest, {})
            try:
                source.check_unchanged()
            except FileChanged:
                self._bucket.delete(key)
                raise
        else:
            name = digest_bytes(f"{self._bucket.address}/{key}".encode()).removeprefix("sha256:")
            transfer.upload(
                self._bucket,
                key,
                source,
                state_path=self._state_folder / f"{name}.json",
                part_bytes=transfer.part_bytes_of(source.size_bytes, self._part_bytes),
                progress=progress,
            )
        if self._size(key) != source.size_bytes:
            raise StoreUnavailable(f"the store took {source.path} and has not got it; try again")

    def _read(self, key: str, offset: int, size_bytes: int) -> bytes | None:
        blocks: list[bytes] = []
        try:
            for block in self._bucket.stream(key, offset, size_bytes):
                blocks.append(block)
        except _Missing:
            return None
        return b"".join(blocks)

    def _download(self, key: str, file: BinaryIO, size_bytes: int) -> Iterator[int]:
        descriptor = file.fileno()

        def copy(offset: int, size: int) -> int:
            end = offset + size
            for block in self._bucket.stream(key, offset, size):
                os.pwrite(descriptor, block, offset)
                offset += len(block)
            if offset != end:
                raise StoreUnavailable(f"{key} ended {end - offset} bytes early; try again")
            return end

        ranges = [(offset, size) for _, offset, size in transfer.part_ranges(size_bytes, limits.DOWNLOAD_RANGE_BYTES)]
        with ThreadPoolExecutor(limits.PARTS_PARALLEL_MAX, thread_name_prefix="download") as pool:
            futures = [pool.submit(copy, *item) for item in ranges]
            try:
                for future in futures:
                    yield future.result()
            except _Missing as error:
                raise UnknownBlob(f"{key} was deleted while it was being read") from error
            finally:
                for future in futures:
                    future.cancel()

    def _size(self, key: str) -> int | None:
        return self._bucket.size(key)

    def _keys(self, prefix: str) -> Iterator[str]:
        return self._bucket.keys(prefix)

    def _delete(self, key: str) -> None:
        self._bucket.delete(key)


class _Missing(Exception):
    """The key or the upload does not exist."""


class _PastEnd(Exception):
    """The range begins at or behind the object's end."""


class _Client(Minio):
    """Signs a body with the digest that is known already: minio would read it whole into memory and hash it again."""

    def _build_headers(
        self, host: str, headers: Any = None, body: Any = None, creds: Any = None
    ) -> tuple[Any, datetime]:
        known = (headers or {}).pop("x-amz-content-sha256", None)
        built, date = super()._build_headers(host, headers, None if known else body, creds)
        if known:
            built["x-amz-content-sha256"] = known
        return built, date


class _Bucket:
    """The client's calls on one bucket, with its errors as ours. Implements `transfer.PartStore`."""

    def __init__(self, config: PlatformConfig) -> None:
        timeout = urllib3.Timeout(connect=limits.STORE_CONNECT_TIMEOUT_S, read=limits.STORE_READ_TIMEOUT_S)
        retries = urllib3.Retry(
            total=limits.STORE_RETRIES_MAX, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504]
        )
        pool = urllib3.PoolManager(
            timeout=timeout, retries=retries, maxsize=4 * limits.PARTS_PARALLEL_MAX, blocksize=limits.STORE_BLOCK_BYTES
        )
        self._name = config.s3_bucket
        self._client: Any = _Client(
            config.s3_endpoint,
            access_key=config.s3_access_key,
            secret_key=config.s3_secret_key,
            secure=config.s3_secure,
            http_client=pool,
        )
        self.address = f"{config.s3_endpoint}/{config.s3_bucket}"

    def ensure(self) -> None:
        with self._errors():
            try:
                self._client.make_bucket(self._name)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def put(self, key: str, body: bytes | FileSlice, size_bytes: int, digest: str, query: dict[str, str]) -> str:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size_bytes),
            "x-amz-content-sha256": digest.removeprefix("sha256:"),
        }
        with self._errors():
            return str(self._client._put_object(self._name, key, body, headers, query).etag)

    def stream(self, key: str, offset: int, size_bytes: int) -> Iterator[bytes]:
        """Blocks of the range, fewer bytes at the object's end; a broken connection is taken up where it broke."""
        end, broken = offset + size_bytes, 0
        while offset < end:
            try:
                with self._errors():
                    for block in self._stream_once(key, offset, end - offset):
                        offset += len(block)
                        yield block
                return
            except _PastEnd:
                return
            except StoreUnavailable:
                broken += 1
                if broken > limits.STORE_RETRIES_MAX:
                    raise

    def _stream_once(self, key: str, offset: int, size_bytes: int) -> Iterator[bytes]:
        response = self._client.get_object(self._name, key, offset=offset, length=size_bytes)
        try:
            yield from response.stream(limits.STORE_BLOCK_BYTES)
        finally:
            response.close()
            response.release_conn()

    def size(self, key: str) -> int | None:
        try:
            with self._errors():
                return int(self._client.stat_object(self._name, key).size)
        except _Missing:
            return None

    def keys(self, prefix: str) -> Iterator[str]:
        with self._errors():
            for item in self._client.list_objects(self._name, prefix=prefix, recursive=True):
                if not item.is_dir:
                    yield str(item.object_name)

    def delete(self, key: str) -> None:
        with self._errors():
            self._client.remove_object(self._name, key)

    def presign(self, method: str, key: str, query: dict[str, str]) -> str:
        with self._errors():
            return str(
                self._client.get_presigned_url(
                    method, self._name, key, extra_query_params=query, expires=timedelta(seconds=limits.PRESIGN_TTL_S)
                )
            )

    def begin(self, key: str) -> str:
        with self._errors():
            return str(self._client._create_multipart_upload(self._name, key, {}))

    def present(self, key: str, upload_id: str) -> dict[int, transfer.Part] | None:
        parts: dict[int, transfer.Part] = {}
        marker: str | None = None
        try:
            with self._errors():
                for _ in range(limits.PARTS_MAX):
                    page = self._client._list_parts(self._name, key, upload_id, part_number_marker=marker)
                    parts |= {
                        part.part_number: transfer.Part(etag=part.etag, size_bytes=part.size or 0)
                        for part in page.parts
                    }
                    marker = page.next_part_number_marker
                    if not page.is_truncated or not marker:
                        break
        except _Missing:
            return None
        return parts

    def send(self, key: str, upload_id: str, number: int, body: FileSlice, digest: str) -> str:
        return self.put(key, body, body.size_bytes, digest, {"partNumber": str(number), "uploadId": upload_id})

    def complete(self, key: str, upload_id: str, parts: Sequence[tuple[int, str]]) -> None:
        try:
            with self._errors():
                self._client._complete_multipart_upload(
                    self._name, key, upload_id, [MinioPart(*part) for part in parts]
                )
        except _Missing as error:
            raise StoreUnavailable(f"the store no longer knows the upload of {key}; upload it again") from error

    def abort(self, key: str, upload_id: str) -> None:
        try:
            with self._errors():
                self._client._abort_multipart_upload(self._name, key, upload_id)
        except _Missing:
            return

    def pending(self, key: str) -> list[str]:
        """Ids of the unfinished uploads of `key`, oldest first."""
        return [item.upload_id for item in self._uploads(key) if item.object_name == key]

    def abort_older(self, limit: datetime) -> int:
        """Gives up uploads that began before `limit`; how many."""
        stale = [item for item in self._uploads("") if item.initiated_time is not None and item.initiated_time < limit]
        for item in stale:
            self.abort(item.object_name, item.upload_id)
        return len(stale)

    def _uploads(self, prefix: str) -> list[Any]:
        try:
            with self._errors():
                uploads = self._client._list_multipart_uploads(self._name, prefix=prefix).uploads
        except _Missing:  # rclone's way of saying that there is none
            return []
        oldest = datetime.min.replace(tzinfo=UTC)
        return sorted(uploads, key=lambda item: item.initiated_time or oldest)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _translated(error, _code_of(error), self.address) from error


def _code_of(error: Exception) -> str:
    """S3's name of the error, else its HTTP status, else nothing."""
    if isinstance(error, S3Error):
        return str(error.code)
    if isinstance(error, InvalidResponseError):
        # Some servers answer errors as text/xml, which the client does not read (minio-java#1631).
        named = re.search(r"<Code>(\w+)</Code>", str(error._body))
        return named.group(1) if named else "NoSuchKey" if error._code == 404 else str(error._code)
    return str(error.status_code) if isinstance(error, ServerError) else ""


def _translated(error: Exception, code: str, address: str) -> Exception:
    if code in _MISSING:
        return _Missing()
    if code == "InvalidRange":
        return _PastEnd()
    if code in _DENIED:
        return StoreDenied(
            f"the object store at {address} refuses the credentials ({code}); check "
            "SMELT_PLATFORM_S3_ACCESS_KEY and SMELT_PLATFORM_S3_SECRET_KEY"
        )
    if code in _FULL or code == "507":
        return DiskFull(f"the object store at {address} is full ({code}); free space there and try again")
    if code in _ALTERED:
        return FileChanged(f"the bytes sent to {address} are not those that were hashed; store the file again")
    if code == "NoSuchBucket":
        return StoreUnavailable(f"the object store has no bucket {address}; create it (`smelt up` does)")
    return StoreUnavailable(f"the object store at {address} does not answer as it should: {error}; try again later")
