"""Names in the real catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from uuid import uuid4

import pytest
from smelt.job.v1 import job_pb2

from smeltkit.bus import Bus
from smeltkit.bus.subjects import CATALOG_BUCKET
from smeltkit.catalog import Catalog, Entry
from smeltkit.errors import BadDigest, BadName, BadRequest, CorruptRecord, NameTaken, RevisionConflict, UnknownModel
from smeltkit.ids import digest_bytes
from smeltkit.jobs.worker import JobContext
from smeltkit.manifest import BUNDLE_TYPE, REPORT_TYPE
from smeltkit.rpc.context import TENANT
from smeltkit.testing.jobs import JobRig

ONE, TWO = digest_bytes(b"1"), digest_bytes(b"2")


@pytest.fixture
def catalog(bus: Bus) -> Catalog:
    """The catalogue of the session's NATS."""
    return Catalog(bus)


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"model-{uuid4().hex}"


async def test_a_name_resolves_to_what_it_was_set_to(catalog: Catalog, name: str) -> None:
    entry = await catalog.set(name, ONE, BUNDLE_TYPE, 7)
    assert (entry.name, entry.digest, entry.size_bytes) == (f"{name}:latest", ONE, 7)
    assert await catalog.resolve(name) == await catalog.resolve(f"{name}:latest") == ONE
    assert await catalog.get(name) == entry


async def test_a_digest_resolves_to_itself(catalog: Catalog) -> None:
    assert await catalog.resolve(ONE) == ONE


async def test_an_unknown_name_is_an_unknown_model(catalog: Catalog, name: str) -> None:
    assert await catalog.get(name) is None
    with pytest.raises(UnknownModel, match=name):
        await catalog.resolve(name)


@pytest.mark.parametrize("bad", ["", "A", "a b", "../a", "a:b:c", "a/b/c/d/e", "sha256:12", "a*", "a>"])
async def test_a_malformed_name_is_refused(catalog: Catalog, bad: str) -> None:
    with pytest.raises((BadName, UnknownModel)):
        await catalog.resolve(bad)
    if bad != "sha256:12":
        with pytest.raises(BadName):
            await catalog.set(bad, ONE, BUNDLE_TYPE, 0)


async def test_a_name_points_at_digests_only(catalog: Catalog, name: str) -> None:
    with pytest.raises(BadDigest):
        await catalog.set(name, "sha256:12", BUNDLE_TYPE, 0)
    with pytest.raises(BadRequest):
        await catalog.set(name, ONE, BUNDLE_TYPE, -1)


@pytest.mark.parametrize("suffix", [":v1.0", "/part.two:a_b", "..x", ".", "-:latest", "/a/b/c"])
async def test_every_legal_name_is_a_legal_key(catalog: Catalog, name: str, suffix: str) -> None:
    entry = await catalog.set(name + suffix, ONE, BUNDLE_TYPE, 0)
    assert await catalog.get(name + suffix) == entry
    assert entry in await catalog.list()


async def test_tags_of_one_name_are_different_entries(catalog: Catalog, name: str) -> None:
    await catalog.set(f"{name}:a", ONE, BUNDLE_TYPE, 0)
    await catalog.set(f"{name}:b", TWO, BUNDLE_TYPE, 0)
    assert (await catalog.resolve(f"{name}:a"), await catalog.resolve(f"{name}:b")) == (ONE, TWO)


async def test_without_an_expected_revision_the_last_one_wins(catalog: Catalog, name: str) -> None:
    first = await catalog.set(name, ONE, BUNDLE_TYPE, 0)
    second = await catalog.set(name, TWO, BUNDLE_TYPE, 0)
    assert second.revision > first.revision
    assert await catalog.resolve(name) == TWO


async def test_an_expected_revision_that_is_not_the_present_one_conflicts(catalog: Catalog, name: str) -> None:
    first = await catalog.set(name, ONE, BUNDLE_TYPE, 0)
    await catalog.set(name, TWO, BUNDLE_TYPE, 0, expected_revision=first.revision)
    with pytest.raises(RevisionConflict):
        await catalog.set(name, ONE, BUNDLE_TYPE, 0, expected_revision=first.revision)
    assert await catalog.resolve(name) == TWO


async def test_of_many_swaps_at_once_one_wins(catalog: Catalog, name: str) -> None:
    first = await catalog.set(name, ONE, BUNDLE_TYPE, 0)
    swaps = (catalog.set(name, TWO, BUNDLE_TYPE, size, expected_revision=first.revision) for size in range(8))
    results = await asyncio.gather(*swaps, return_exceptions=True)
    assert sum(isinstance(result, RevisionConflict) for result in results) == 7


async def test_entries_are_listed_by_name_and_type(catalog: Catalog, name: str) -> None:
    await catalog.set(f"{name}-b", ONE, BUNDLE_TYPE, 0)
    await catalog.set(f"{name}-a", ONE, BUNDLE_TYPE, 0)
    await catalog.set(f"{name}-c", ONE, REPORT_TYPE, 0)
    bundles = [entry.name for entry in await catalog.list(BUNDLE_TYPE) if entry.name.startswith(name)]
    assert bundles == [f"{name}-a:latest", f"{name}-b:latest"]
    assert len([entry for entry in await catalog.list() if entry.name.startswith(name)]) == 3


async def test_a_corrupt_entry_is_named_and_the_others_are_listed(rig: JobRig) -> None:
    catalog = Catalog(rig.bus)
    entry = await catalog.set("fine", ONE, BUNDLE_TYPE, 0)
    await rig.bus.bucket(CATALOG_BUCKET).create("broken=3alatest", b"\xff\xff")
    with pytest.raises(CorruptRecord, match="broken"):
        await catalog.get("broken")
    assert await catalog.list() == [entry]


async def _as(tenant: str, giving: Awaitable[Entry | None]) -> Entry | None:
    """Gives a name in a call of this tenant, "" for the platform."""
    served = TENANT.set(tenant)
    try:
        return await giving
    finally:
        TENANT.reset(served)


async def test_a_tenant_moves_only_names_that_it_gave_itself(catalog: Catalog, name: str) -> None:
    """The refusal names nobody; what the platform moved is the platform's."""
    first = await _as("alice", catalog.set(name, ONE, BUNDLE_TYPE, 1))
    assert first is not None and first.tenant == "alice"
    for revision in (0, first.revision):
        with pytest.raises(NameTaken, match=f"{name}:latest was given by another tenant .* choose another") as refused:
            await _as("bob", catalog.set(name, TWO, BUNDLE_TYPE, 1, revision))
        assert "alice" not in refused.value.message
    with pytest.raises(NameTaken):
        await _as("bob", catalog.check_free(name))
    await _as("alice", catalog.set(name, TWO, BUNDLE_TYPE, 1))
    await catalog.set(name, ONE, BUNDLE_TYPE, 1)
    with pytest.raises(NameTaken):
        await _as("alice", catalog.set(name, TWO, BUNDLE_TYPE, 1))
    assert await catalog.resolve(name) == ONE


async def test_a_job_gives_names_for_its_tenant(rig: JobRig, name: str) -> None:
    """A name that was given while the job ran ends it with the reason; jobs of the platform may move it."""
    catalog = Catalog(rig.bus)
    await _as("alice", catalog.set(name, ONE, BUNDLE_TYPE, 1))

    async def give(context: JobContext) -> str:
        return (await catalog.set(name, TWO, BUNDLE_TYPE, 1)).digest

    async with rig.working({"give": give}):
        for tenant, state in (("bob", job_pb2.JOB_STATE_FAILED), ("", job_pb2.JOB_STATE_SUCCEEDED)):
            request = job_pb2.GetJobRequest(id=tenant)
            job = await rig.ledger.start(
                service="toy", kind="give", request=request, request_id=uuid4().hex, tenant=tenant
            )
            ended = await rig.end(job.id)
            assert (ended.state, ended.error.reason) == (state, "NAME_TAKEN" if tenant else "")
