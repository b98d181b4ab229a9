"""Resumable multipart upload: a file in parts of 64 MiB, each with our own checksum, several on the way at a time.

A state file remembers the upload and the checksum and tag of every part that arrived; it is replaced after each part.
After a crash the next call asks the store which parts it has and sends the rest. A part counts as present only if
the state file and the store name the same tag: tags identify what we sent, they are never compared with content.
Nothing is visible under the key before the last step, so an abandoned upload leaves no half-written object.

The file's sha256 is its identity; the parts carry a CRC-32, which the server compares with what arrived. Hashing twice
by sha256 would cost more than the transfer on processors without instructions for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from smeltkit import limits
from smeltkit.blobs.source import FileSlice, Source
from smeltkit.blobs.store import Progress
from smeltkit.errors import FileChanged
from smeltkit.locks import file_lock


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that the store has: its tag and size in bytes."""

    etag: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SentPart:
    """A part to be joined: number from 1, the store's tag, our CRC-32 (empty if a client sent it by a URL)."""

    number: int
    etag: str
    crc32: str = ""


class PartStore(Protocol):
    """The multipart calls of a back end."""

    def begin(self, key: str) -> str:
        """A new upload id."""

    def present(self, key: str, upload_id: str) -> dict[int, Part] | None:
        """Parts by number, None if the store does not know the upload (any more)."""

    def send(self, key: str, upload_id: str, number: int, body: FileSlice, crc32: str) -> str:
        """Sends one part; its tag. The store refuses it if other bytes arrive than have this CRC-32."""

    def complete(self, key: str, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Joins the parts, in order, under the key."""

    def abort(self, key: str, upload_id: str) -> None:
        """Gives up the upload."""


@dataclass(kw_only=True)
class UploadState:
    """What the state file holds."""

    upload_id: str
    size_bytes: int
    part_bytes: int
    parts: dict[str, dict[str, str]]

    @classmethod
    def load(cls, path: Path) -> UploadState | None:
        """The state of an earlier try, None if there is none that can be read."""
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
            return cls(
                upload_id=str(value["upload_id"]),
                size_bytes=int(value["size_bytes"]),
                part_bytes=int(value["part_bytes"]),
                parts=dict(value["parts"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, path: Path) -> None:
        """Replaces the state file atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)


def part_bytes_of(size_bytes: int, part_bytes: int = limits.PART_BYTES) -> int:
    """Size of the parts of a file of `size_bytes`: `part_bytes`, more only where that would make over 10 000 parts."""
    return max(part_bytes, -(-size_bytes // limits.PARTS_MAX))


def part_ranges(size_bytes: int, part_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Number from 1, offset and size in bytes of each part."""
    for number, offset in enumerate(range(0, size_bytes, part_bytes), start=1):
        yield number, offset, min(part_bytes, size_bytes - offset)


def upload(
    store: PartStore, key: str, source: Source, *, state_path: Path, part_bytes: int, progress: Progress
) -> None:
    """Stores `source` under `key`, continuing an earlier try that `state_path` remembers.

    FileChanged if the file was written since it was hashed; the upload is then given up.
    """
    with file_lock(state_path.with_suffix(".lock")):
        state = _resume(store, key, state_path, source.size_bytes, part_bytes)
        state.save(state_path)
        try:
            _send_missing(store, key, source, state, state_path, progress)
            source.check_unchanged()
        except FileChanged:
            store.abort(key, state.upload_id)
            state_path.unlink(missing_ok=True)
            raise
        parts = [SentPart(number=int(number), **state.parts[number]) for number in sorted(state.parts, key=int)]
        store.complete(key, state.upload_id, parts)
        state_path.unlink(missing_ok=True)


def _resume(store: PartStore, key: str, state_path: Path, size_bytes: int, part_bytes: int) -> UploadState:
    state = UploadState.load(state_path)
    present = store.present(key, state.upload_id) if state else None
    if state is None or present is None or (state.size_bytes, state.part_bytes) != (size_bytes, part_bytes):
        if state is not None and present is not None:
            store.abort(key, state.upload_id)
        return UploadState(upload_id=store.begin(key), size_bytes=size_bytes, part_bytes=part_bytes, parts={})
    sizes = {number: size for number, _, size in part_ranges(size_bytes, part_bytes)}
    state.parts = {
        text: part
        for text, part in state.parts.items()
        if present.get(int(text)) == Part(etag=part["etag"], size_bytes=sizes.get(int(text), -1))
    }
    return state


def _send_missing(
    store: PartStore, key: str, source: Source, state: UploadState, state_path: Path, progress: Progress
) -> None:
    lock, stop = threading.Lock(), threading.Event()
    ranges = list(part_ranges(state.size_bytes, state.part_bytes))
    done_bytes = sum(size for number, _, size in ranges if str(number) in state.parts)
    progress(done_bytes)

    def send(number: int, offset: int, size: int) -> None:
        nonlocal done_bytes
        if stop.is_set():
            return
        body = source.slice(offset, size)
        try:
            crc32 = body.crc32()
            etag = store.send(key, state.upload_id, number, body, crc32)
        except BaseException:
            stop.set()
            raise
        with lock:
            state.parts[str(number)] = {"etag": etag, "crc32": crc32}
            state.save(state_path)
            done_bytes += size
            progress(done_bytes)

    with ThreadPoolExecutor(limits.PARTS_PARALLEL_MAX, thread_name_prefix="upload") as pool:
        missing = [item for item in ranges if str(item[0]) not in state.parts]
        for future in [pool.submit(send, *item) for item in missing]:
            future.result()
