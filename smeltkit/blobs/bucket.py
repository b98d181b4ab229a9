"""One bucket through the minio client, with its errors as ours. The only file that imports minio.

Relied upon: put, get, ranges, head, list, delete, multipart. Not relied upon: ETags as digests, conditional writes.
The client has no resumable uploads, so some of its internal calls are used; the contract tests hold them in place.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import urllib3
from minio import Minio
from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from smeltkit import limits
from smeltkit.blobs import transfer
from smeltkit.blobs.source import FileSlice
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadCertificate, DiskFull, FileChanged, StoreDenied, StoreUnavailable
from smeltkit.secret import Secret
from smeltkit.telemetry.failures import counted

ACCESS_KEY, SECRET_KEY = "access-key", "secret-key"
"""Files of a folder of keys."""
_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "ResourceNotFound"})
_DENIED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"})
_REFUSED = _DENIED | {"AccessDenied", "RequestTimeTooSkewed", "RequestExpired"}
"""What a server may say, among other things, of a request that was signed an hour ago or will be in an hour."""
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_ALTERED = frozenset({"XAmzContentSHA256Mismatch", "BadDigest"})


class Missing(Exception):
    """The key or the upload does not exist."""


class PastEnd(Exception):
    """The range begins at or behind the object's end."""


class _Client(Minio):
    """Signs a body by the digest in its headers, or none: minio would read it whole into memory and hash it again."""

    def _build_headers(
        self, host: str, headers: Any = None, body: Any = None, creds: Any = None
    ) -> tuple[Any, datetime]:
        known = (headers or {}).pop("x-amz-content-sha256", None)
        built, date = super()._build_headers(host, headers, None if known else body, creds)
        if known:
            built["x-amz-content-sha256"] = known
        return built, date


class _Keys(Provider):
    """The keys of each request: files may hold others by then."""

    def __init__(self, config: PlatformConfig) -> None:
        folder = Path(config.s3_keys_dir)
        files = [str(folder / name) if config.s3_keys_dir else "" for name in (ACCESS_KEY, SECRET_KEY)]
        self._access = Secret(config.s3_access_key, file=files[0])
        self._secret = Secret(config.s3_secret_key, file=files[1])

    def retrieve(self) -> Credentials:
        return Credentials(self._access(), self._secret())


class Bucket:
    """The client's calls on one bucket, with its errors as ours. Implements `transfer.PartStore`."""

    def __init__(self, config: PlatformConfig, *, retries_max: int = limits.STORE_RETRIES_MAX) -> None:
        """`retries_max` bounds how often a request is repeated while the server is away or fails."""
        timeout = urllib3.Timeout(connect=limits.STORE_CONNECT_TIMEOUT_S, read=limits.STORE_READ_TIMEOUT_S)
        retries = urllib3.Retry(total=retries_max, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
        pool = urllib3.PoolManager(
            timeout=timeout,
            retries=retries,
            maxsize=4 * limits.PARTS_PARALLEL_MAX,
            blocksize=limits.STORE_BLOCK_BYTES,
            ca_certs=config.s3_ca_file or None,
        )
        self._name = config.s3_bucket
        self._client: Any = _Client(
            config.s3_endpoint, credentials=_Keys(config), secure=config.s3_secure, http_client=pool
        )
        self.address = f"{config.s3_endpoint}/{config.s3_bucket}"

    def ensure(self) -> None:
        """Creates the bucket unless it is there."""
        with self._errors():
            try:
                self._client.make_bucket(self._name)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def prove(self) -> None:
        """Asks for nothing in particular; StoreDenied, BadCertificate and StoreUnavailable say what is wrong."""
        with self._errors():
            self._client._execute("GET", self._name, query_params={"list-type": "2", "max-keys": "1"})

    def put(
        self,
        key: str,
        body: bytes | FileSlice,
        size_bytes: int,
        crc32: str,
        *,
        digest: str = "",
        query: dict[str, str] | None = None,
    ) -> str:
        """Writes an object, or a part of an upload; its tag. FileChanged if the server received other bytes."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size_bytes),
            "x-amz-checksum-crc32": crc32,
            "x-amz-content-sha256": digest.removeprefix("sha256:") or "UNSIGNED-PAYLOAD",
        }
        with self._errors():
            return str(self._client._put_object(self._name, key, body, headers, query or {}).etag)

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
            except PastEnd:
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

    def stat(self, key: str) -> tuple[int, float] | None:
        """Size in bytes of the object and when it was written, by the server's clock in Unix time; None without it."""
        try:
            with self._errors():
                found = self._client.stat_object(self._name, key)
                return int(found.size), float(found.last_modified.timestamp())
        except Missing:
            return None

    def entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Key, size in bytes and time of writing of every object whose key starts with `prefix`, sorted by key."""
        with self._errors():
            for item in self._client.list_objects(self._name, prefix=prefix, recursive=True):
                if not item.is_dir:
                    yield str(item.object_name), int(item.size), float(item.last_modified.timestamp())

    def delete(self, key: str) -> None:
        """Deletes the object if it is there."""
        with self._errors():
            self._client.remove_object(self._name, key)

    def presign(self, method: str, key: str, query: dict[str, str]) -> str:
        """A URL for one request without credentials, valid for an hour."""
        with self._errors():
            return str(
                self._client.get_presigned_url(
                    method, self._name, key, extra_query_params=query, expires=timedelta(seconds=limits.PRESIGN_TTL_S)
                )
            )

    def begin(self, key: str, *, is_checked: bool = True) -> str:
        """A new upload id; `is_checked` if every part will carry a CRC-32."""
        headers = {"x-amz-checksum-algorithm": "CRC32"} if is_checked else {}
        with self._errors():
            return str(self._client._create_multipart_upload(self._name, key, headers))

    def present(self, key: str, upload_id: str) -> dict[int, transfer.Part] | None:
        """Parts of the upload by number, None if the server does not know it (any more)."""
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
        except Missing:
            return None
        return parts

    def send(self, key: str, upload_id: str, number: int, body: FileSlice, crc32: str) -> str:
        """Sends one part; its tag."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        return self.put(key, body, body.size_bytes, crc32, query=query)

    def complete(self, key: str, upload_id: str, parts: Sequence[transfer.SentPart]) -> None:
        """Joins the parts, in order, under the key."""
        root = ElementTree.Element("CompleteMultipartUpload", xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
        for part in parts:
            item = ElementTree.SubElement(root, "Part")
            ElementTree.SubElement(item, "PartNumber").text = str(part.number)
            ElementTree.SubElement(item, "ETag").text = f'"{part.etag}"'
            if part.crc32:
                ElementTree.SubElement(item, "ChecksumCRC32").text = part.crc32
        body, headers = ElementTree.tostring(root), {"Content-Type": "application/xml"}
        try:
            with self._errors():
                self._client._execute("POST", self._name, key, body, headers, {"uploadId": upload_id})
        except Missing as error:
            raise StoreUnavailable(f"the store no longer knows the upload of {key}; upload it again") from error

    def abort(self, key: str, upload_id: str) -> None:
        """Gives up the upload if the server knows it."""
        try:
            with self._errors():
                self._client._abort_multipart_upload(self._name, key, upload_id)
        except Missing:
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
        except Missing:  # rclone's way of saying that there is none
            return []
        oldest = datetime.min.replace(tzinfo=UTC)
        return sorted(uploads, key=lambda item: item.initiated_time or oldest)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise counted(_translated(error, _code_of(error), self.address)) from error


def _code_of(error: Exception) -> str:
    """S3's name of the error, else its HTTP status, else nothing."""
    if isinstance(error, S3Error):
        return str(error.code)
    if isinstance(error, InvalidResponseError):
        # Some servers answer errors as text/xml, which the client does not read (minio-java#1631).
        named = re.search(r"<Code>(\w+)</Code>", str(error._body))
        return named.group(1) if named else "NoSuchKey" if error._code == 404 else str(error._code)
    return str(error.status_code) if isinstance(error, ServerError) else ""


def _clock_ahead_s(error: Exception) -> float:
    """By how much this machine's clock is ahead of the server's, as far as its answer tells."""
    response = getattr(error, "response", None)
    told = response.headers.get("Date") if response is not None else None
    return time.time() - parsedate_to_datetime(told).timestamp() if told else 0.0


def _translated(error: Exception, code: str, address: str) -> Exception:
    if code in _MISSING:
        return Missing()
    if code == "InvalidRange":
        return PastEnd()
    if code in _REFUSED and abs(ahead_s := _clock_ahead_s(error)) > limits.STORE_CLOCK_OFF_MAX_S:
        return StoreUnavailable(
            f"this machine's clock is {ahead_s:+.0f} s off that of the object store at {address}, which takes nothing"
            f" that is signed here ({code}); set the clock"
        )
    if code == "AccessDenied":
        return StoreDenied(
            f"the object store at {address} does not let this key do that ({code}); give it the policy that "
            "`python -m smeltkit.blobs.access SERVICE BUCKET` prints"
        )
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
        return StoreUnavailable(
            f"the object store has no bucket {address}; create it (`smelt up` and `python -m smeltkit.blobs` do)"
        )
    cause = getattr(error, "reason", None) or error
    if isinstance(cause, urllib3.exceptions.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
        return BadCertificate(
            f"the object store at {address} speaks no TLS; set SMELT_PLATFORM_S3_SECURE to false, or name its TLS port"
        )
    if isinstance(cause, urllib3.exceptions.SSLError):
        return BadCertificate(
            f"the object store at {address} shows no certificate that this process trusts: {cause}; let "
            "SMELT_PLATFORM_S3_CA_FILE name the authorities that issued it, or replace it"
        )
    if code.startswith("5") or code == "InternalError" or isinstance(cause, urllib3.exceptions.ResponseError):
        return StoreUnavailable(
            f"the object store at {address} fails on every try ({code or cause}); its disk may be full, see its log"
        )
    return StoreUnavailable(f"the object store at {address} does not answer as it should: {cause}; try again later")
