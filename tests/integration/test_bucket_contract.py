"""One contract, two buckets: what holds for the real bucket of NATS holds for the fake, or tests on it mean nothing."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import uuid4

import pytest
from nats.js.api import ConsumerInfo

from smeltkit.bus import Bus
from smeltkit.bus.kv import Bucket
from smeltkit.bus.subjects import STAGES_BUCKET
from smeltkit.errors import RevisionConflict
from smeltkit.testing.bus import MemoryBus


@pytest.fixture(params=["nats", "memory"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    """The same bucket, real and in memory."""
    if request.param == "memory":
        return MemoryBus().bucket(STAGES_BUCKET)
    bus: Bus = request.getfixturevalue("bus")
    return bus.bucket(STAGES_BUCKET)


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return uuid4().hex


async def test_a_created_key_has_its_value_and_revision(bucket: Bucket, key: str) -> None:
    revision = await bucket.create(key, b"first")
    entry = await bucket.get(key)
    assert entry is not None
    assert (entry.key, entry.value, entry.revision) == (key, b"first", revision)


async def test_a_key_that_was_never_written_is_none(bucket: Bucket, key: str) -> None:
    assert await bucket.get(key) is None


async def test_creating_twice_conflicts_and_keeps_the_first(bucket: Bucket, key: str) -> None:
    await bucket.create(key, b"first")
    with pytest.raises(RevisionConflict):
        await bucket.create(key, b"second")
    entry = await bucket.get(key)
    assert entry is not None and entry.value == b"first"


async def test_an_update_at_the_present_revision_replaces_the_value(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"first")
    second = await bucket.update(key, b"second", first)
    entry = await bucket.get(key)
    assert entry is not None
    assert (entry.value, entry.revision) == (b"second", second)
    assert second > first


async def test_an_update_at_an_old_revision_conflicts(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"first")
    await bucket.update(key, b"second", first)
    with pytest.raises(RevisionConflict):
        await bucket.update(key, b"third", first)


async def test_an_update_of_a_missing_key_conflicts(bucket: Bucket, key: str) -> None:
    with pytest.raises(RevisionConflict):
        await bucket.update(key, b"value", 1)


async def test_revisions_grow_over_all_keys(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"")
    second = await bucket.create(f"{key}-2", b"")
    assert second > first


async def test_a_deleted_key_is_gone_and_may_be_created_again_with_a_greater_revision(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"first")
    await bucket.delete(key, first)
    assert await bucket.get(key) is None
    assert await bucket.create(key, b"again") > first


async def test_deleting_at_an_old_revision_conflicts(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"first")
    await bucket.update(key, b"second", first)
    with pytest.raises(RevisionConflict):
        await bucket.delete(key, first)


async def test_a_deleted_key_cannot_be_updated(bucket: Bucket, key: str) -> None:
    first = await bucket.create(key, b"first")
    await bucket.delete(key, first)
    with pytest.raises(RevisionConflict):
        await bucket.update(key, b"second", first)


async def test_entries_are_the_present_values_in_the_order_of_their_writes(bucket: Bucket, key: str) -> None:
    one = await bucket.create(f"{key}-1", b"one")
    await bucket.create(f"{key}-2", b"two")
    gone = await bucket.create(f"{key}-3", b"three")
    await bucket.update(f"{key}-1", b"one again", one)
    await bucket.delete(f"{key}-3", gone)
    found = [(entry.key, entry.value) for entry in await bucket.entries() if entry.key.startswith(key)]
    assert found == [(f"{key}-2", b"two"), (f"{key}-1", b"one again")]


async def test_entries_after_a_revision_are_those_written_later(bucket: Bucket, key: str) -> None:
    first = await bucket.create(f"{key}-1", b"one")
    await bucket.create(f"{key}-2", b"two")
    assert [entry.key for entry in await bucket.entries(first)] == [f"{key}-2"]
    assert await bucket.entries(first + 1_000) == []


async def test_many_entries_are_all_found(bucket: Bucket, key: str) -> None:
    """More than one batch of the scan."""
    for index in range(600):
        await bucket.create(f"{key}-{index}", str(index).encode())
    found = [entry.value for entry in await bucket.entries() if entry.key.startswith(key)]
    assert found == [str(index).encode() for index in range(600)]


async def test_a_doorbell_rings_for_its_key_only(bucket: Bucket, key: str) -> None:
    async with bucket.watch(key) as bell:
        await bucket.create(f"{key}-other", b"")
        assert not await bell.wait(0.1)
        await bucket.create(key, b"")
        assert await bell.wait(5)


async def test_a_ring_between_two_waits_is_kept(bucket: Bucket, key: str) -> None:
    async with bucket.watch(key) as bell:
        revision = await bucket.create(key, b"1")
        assert await bell.wait(5)
        await bucket.update(key, b"2", revision)
        assert await bell.wait(5)
        assert not await bell.wait(0.05)


async def test_a_listing_from_a_server_that_is_behind_waits_for_the_last_write(
    bus: Bus, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster the consumer's server may not have stored the last write yet: it sees nothing pending."""
    add_consumer = bus.jetstream.add_consumer

    async def behind(*args: Any, **kwargs: Any) -> ConsumerInfo:
        return dataclasses.replace(await add_consumer(*args, **kwargs), num_pending=0)

    monkeypatch.setattr(bus.jetstream, "add_consumer", behind)
    bucket = bus.bucket(STAGES_BUCKET)
    revision = await bucket.create(key, b"first")
    assert revision in [entry.revision for entry in await bucket.entries()]
    assert await bucket.entries(revision) == []
