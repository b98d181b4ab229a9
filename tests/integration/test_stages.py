"""The cache of deterministic stages on the real NATS."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from smeltkit.bus import Bus
from smeltkit.errors import BadDigest
from smeltkit.ids import digest_bytes
from smeltkit.jobs.stages import StageCache
from smeltkit.revision import code_revision

INPUT, RESULT, OTHER = digest_bytes(b"in"), digest_bytes(b"out"), digest_bytes(b"other")


class Stored:
    """Which digests the store holds."""

    def __init__(self, *digests: str) -> None:
        self.digests = set(digests)

    async def __call__(self, digest: str) -> bool:
        return digest in self.digests


def cache(bus: Bus, *stored: str, revision: str = "r1") -> StageCache:
    """A cache over a store that holds `stored`."""
    return StageCache(bus, Stored(*stored), revision=revision)


def key_of(bus: Bus, unique: str) -> str:
    return cache(bus).key("quantize", {"scheme": unique}, [INPUT])


async def test_a_result_is_found_by_what_went_in(bus: Bus) -> None:
    stages, key = cache(bus, RESULT), key_of(bus, "found")
    assert await stages.get(key) is None
    await stages.put(key, RESULT)
    assert await stages.get(key) == RESULT


async def test_a_hit_whose_object_is_gone_is_no_hit(bus: Bus) -> None:
    """R-013: the name of a result is not the result."""
    stored = Stored(RESULT)
    stages, key = StageCache(bus, stored, revision="r1"), key_of(bus, "gone")
    await stages.put(key, RESULT)
    stored.digests.clear()
    assert await stages.get(key) is None


async def test_a_result_made_again_replaces_the_one_that_is_gone(bus: Bus) -> None:
    key = key_of(bus, "again")
    await cache(bus).put(key, RESULT)
    await cache(bus).put(key, OTHER)
    assert await cache(bus, OTHER).get(key) == OTHER


async def test_writers_at_once_leave_one_result(bus: Bus) -> None:
    key = key_of(bus, "race")
    await asyncio.gather(*(cache(bus).put(key, digest) for digest in (RESULT, OTHER) * 4))
    assert await cache(bus, RESULT, OTHER).get(key) in (RESULT, OTHER)


async def test_only_digests_are_remembered(bus: Bus) -> None:
    with pytest.raises(BadDigest):
        await cache(bus).put(key_of(bus, "bad"), "latest")


@pytest.mark.parametrize(
    "other",
    [
        {"operation": "convert"},
        {"parameters": {"scheme": "Q4_0"}},
        {"inputs": [OTHER]},
        {"inputs": [INPUT, OTHER]},
        {"revision": "r2"},
    ],
)
async def test_whatever_goes_in_changes_the_key(bus: Bus, other: dict[str, Any]) -> None:
    """R-013: another operation, parameter, input or code is another stage."""
    usual: dict[str, Any] = {"operation": "quantize", "parameters": {"scheme": "Q8_0"}, "inputs": [INPUT]}
    usual["revision"] = "r1"

    def key(revision: str, operation: str, parameters: dict[str, str], inputs: list[str]) -> str:
        return cache(bus, revision=revision).key(operation, parameters, inputs)

    assert key(**usual) == key(**usual)
    assert key(**{**usual, **other}) != key(**usual)


async def test_the_order_of_parameters_does_not_matter(bus: Bus) -> None:
    stages = cache(bus)
    assert stages.key("o", {"a": 1, "b": 2}, []) == stages.key("o", {"b": 2, "a": 1}, [])


async def test_inputs_are_digests(bus: Bus) -> None:
    with pytest.raises(BadDigest):
        cache(bus).key("o", {}, ["ore-11m:latest"])


def test_the_code_revision_is_stable_and_follows_the_sources() -> None:
    assert code_revision() == code_revision()
    assert len(code_revision()) == 12
    assert code_revision(("smeltkit.bus",)) != code_revision(("smeltkit.jobs",))
