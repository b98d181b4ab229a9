"""Multipart uploads without a server: whatever is interrupted, only what is missing is sent again."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smeltkit import limits
from smeltkit.blobs.source import FileSlice, Source, crc32_text
from smeltkit.blobs.transfer import Part, SentPart, part_bytes_of, part_ranges, upload
from smeltkit.errors import FileChanged, StoreUnavailable
from smeltkit.ids import digest_bytes


class MemoryParts:
    """Multipart calls in memory. Breaks after `sends_left` parts; every part it took is written down."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.sent: list[int] = []
        self.sends_left = 10**9

    def begin(self, key: str) -> str:
        """A new upload id."""
        upload_id = f"upload-{len(self.uploads)}"
        self.uploads[upload_id] = {}
        return upload_id

    def present(self, key: str, upload_id: str) -> dict[int, Part] | None:
        """Parts that arrived."""
        parts = self.uploads.get(upload_id)
        if parts is None:
            return None
        return {number: Part(etag=digest_bytes(data), size_bytes=len(data)) for number, data in parts.items()}

    def send(self, key: str, upload_id: str, number: int, body: FileSlice, crc32: str) -> str:
        """Takes a part unless it is time to break."""
        if self.sends_left == 0:
            raise StoreUnavailable("broken on purpose")
        self.sends_left -= 1
        data = body.read()
        assert crc32_text(zlib.crc32(data)) == crc32
        self.uploads[upload_id][number] = data
        self.sent.append(number)
        return digest_bytes(data)

    def complete(self, key: str, upload_id: str, parts: Sequence[SentPart]) -> None:
        """Joins exactly the parts that are named."""
        have = self.uploads.pop(upload_id)
        assert [part.number for part in parts] == sorted(have)
        self.objects[key] = b"".join(have[part.number] for part in parts)

    def abort(self, key: str, upload_id: str) -> None:
        """Forgets the upload."""
        del self.uploads[upload_id]


def put(store: MemoryParts, path: Path, state: Path, part_bytes: int) -> None:
    """Uploads `path` under the key k."""
    with Source.open(path) as source:
        upload(store, "k", source, state_path=state, part_bytes=part_bytes, progress=lambda _: None)


@given(
    data=st.binary(min_size=1, max_size=300),
    part_bytes=st.integers(1, 64),
    breaks=st.lists(st.integers(0, 9), max_size=6),
)
def test_interrupted_upload_sends_each_part_once(data: bytes, part_bytes: int, breaks: list[int]) -> None:
    """However often it breaks, the object is right and no part travels twice."""
    with tempfile.TemporaryDirectory() as folder:
        path, state, store = Path(folder) / "file", Path(folder) / "states" / "s.json", MemoryParts()
        path.write_bytes(data)
        for sends in breaks:
            store.sends_left = sends
            try:
                put(store, path, state, part_bytes)
                break
            except StoreUnavailable:
                assert store.objects == {}
        store.sends_left = 10**9
        if not store.objects:
            put(store, path, state, part_bytes)
        assert store.objects == {"k": data}
        assert sorted(store.sent) == list(range(1, -(-len(data) // part_bytes) + 1))
        assert not state.exists()


@given(size=st.integers(0, 10**13), part_bytes=st.integers(1, 2**27))
def test_parts_cover_the_file_within_the_limit_of_parts(size: int, part_bytes: int) -> None:
    """Never more than 10 000 parts, and no byte outside of them."""
    part_bytes = part_bytes_of(size, part_bytes)
    count = -(-size // part_bytes)
    assert count <= limits.PARTS_MAX
    ranges = list(part_ranges(size, part_bytes))
    assert [number for number, _, _ in ranges] == list(range(1, count + 1))
    assert sum(length for _, _, length in ranges) == size
    assert all(length > 0 for _, _, length in ranges)


def test_state_of_an_upload_the_store_forgot_is_not_trusted(tmp_path: Path) -> None:
    """After the store gave the upload up, every part is sent again."""
    path, state, store = tmp_path / "file", tmp_path / "s.json", MemoryParts()
    path.write_bytes(b"0123456789")
    store.sends_left = 2
    with pytest.raises(StoreUnavailable):
        put(store, path, state, 3)
    store.uploads.clear()
    store.sends_left, store.sent = 10**9, []
    put(store, path, state, 3)
    assert store.objects == {"k": b"0123456789"}
    assert sorted(store.sent) == [1, 2, 3, 4]


def test_part_the_store_has_under_another_tag_is_sent_again(tmp_path: Path) -> None:
    """Another client may have sent other bytes under this number."""
    path, state, store = tmp_path / "file", tmp_path / "s.json", MemoryParts()
    path.write_bytes(b"0123456789")
    store.sends_left = 2
    with pytest.raises(StoreUnavailable):
        put(store, path, state, 3)
    (parts,) = store.uploads.values()
    replaced = next(iter(parts))
    parts[replaced] = b"xxx"
    store.sends_left, store.sent = 10**9, []
    put(store, path, state, 3)
    assert replaced in store.sent
    assert store.objects == {"k": b"0123456789"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"upload_id": 1}', '{"upload_id":"u","size_bytes":10,"part_bytes":3,"parts":7}']
)
def test_unreadable_state_starts_anew(tmp_path: Path, text: str) -> None:
    """A torn or foreign state file costs the parts, not the upload."""
    path, state, store = tmp_path / "file", tmp_path / "s.json", MemoryParts()
    path.write_bytes(b"0123456789")
    state.write_text(text)
    put(store, path, state, 3)
    assert store.objects == {"k": b"0123456789"}


def test_file_that_becomes_shorter_is_given_up(tmp_path: Path) -> None:
    """The upload is aborted and its state forgotten."""
    path, state, store = tmp_path / "file", tmp_path / "s.json", MemoryParts()
    path.write_bytes(b"0123456789")
    with Source.open(path) as source, pytest.raises(FileChanged, match="shorter"):
        path.write_bytes(b"01")
        upload(store, "k", source, state_path=state, part_bytes=3, progress=lambda _: None)
    assert (store.objects, store.uploads, state.exists()) == ({}, {}, False)
