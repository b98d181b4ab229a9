"""A store in a bucket of any S3 server: blobs in checked parts, downloads in parallel ranges, URLs for clients."""

from __future__ import annotations

import logging
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from smeltkit import limits
from smeltkit.blobs import transfer
from smeltkit.blobs.bucket import Bucket, Missing
from smeltkit.blobs.objects import ObjectStore
from smeltkit.blobs.source import Source, crc32_text
from smeltkit.blobs.store import PartUrl, Progress, UploadPlan, blob_key
from smeltkit.config import PlatformConfig
from smeltkit.errors import (
    BadRequest,
    DigestMismatch,
    FileChanged,
    StoreUnavailable,
    UnknownBlob,
)
from smeltkit.ids import digest_bytes

_LOG = logging.getLogger(__name__)


class S3Store(ObjectStore):
    """Implements `Store` and `Presigner` on one bucket.

    `state_folder` remembers unfinished uploads of files larger than `part_bytes`, so that a later try sends the rest.
    """

    def __init__(
        self, config: PlatformConfig, *, state_folder: Path | None = None, part_bytes: int = limits.PART_BYTES
    ) -> None:
        self.config = config
        self._bucket = Bucket(config)
        self._part_bytes = part_bytes
        self._state_folder = state_folder or Path(tempfile.gettempdir()) / f"smelt-uploads-{os.getuid()}"

    def prove(self) -> None:
        """Nothing, unless no later try could work either: StoreDenied or BadCertificate name what is refused."""
        try:
            Bucket(self.config, retries_max=0).prove()
        except StoreUnavailable as error:
            _LOG.warning("%s", error)

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
        if self._keep(key, size_bytes):
            return UploadPlan(is_stored=True)
        pending = self._bucket.pending(key)
        upload_id = pending[-1] if pending else self._bucket.begin(key, is_checked=False)
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
            sent = [transfer.SentPart(number=number, etag=etag) for number, etag in parts]
            self._bucket.complete(key, upload_id, sent)
        found, done_bytes = self.reread(digest)
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
        self._bucket.put(key, data, len(data), crc32_text(zlib.crc32(data)), digest=digest_bytes(data))

    def _upload(self, key: str, source: Source, progress: Progress) -> None:
        if source.size_bytes <= self._part_bytes:
            body = source.slice(0, source.size_bytes)
            self._bucket.put(key, body, body.size_bytes, body.crc32(), digest=source.digest)
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
        except Missing:
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
            except Missing as error:
                raise UnknownBlob(f"{key} was deleted while it was being read") from error
            finally:
                for future in futures:
                    future.cancel()

    def _entries(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        return self._bucket.entries(prefix)

    def _stat(self, key: str) -> tuple[int, float] | None:
        return self._bucket.stat(key)

    def _delete(self, key: str) -> None:
        self._bucket.delete(key)
