"""Accounts of tenants: windows, charges that count once, and two gateways that write at the same moment."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import BYTES, GPU, TOKENS, Quota, Tenant
from smeltkit import limits
from smeltkit.errors import QuotaUsedUp
from smeltkit.testing.bus import MemoryBucket

BOB = Tenant(name="bob")


def holder(**allowed: int) -> Tenant:
    """Alice, with these amounts a minute."""
    return Tenant(name="alice", quotas={name: Quota(allowed=amount, window_s=60) for name, amount in allowed.items()})


class Clock:
    """A clock that tests set."""

    now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_window_of_tokens_ends_and_another_begins() -> None:
    clock, alice = Clock(), holder(tokens=10)
    accounts = Accounts(MemoryBucket(), clock)
    for tokens in (6, 6):
        await accounts.check(alice, TOKENS)
        accounts.count(alice, TOKENS, tokens)
        accounts.count(BOB, TOKENS, 10**9)
    with pytest.raises(
        QuotaUsedUp, match="alice used 12 of 10 tokens in 60 s; the next window begins in 20 s. Wait for it, or"
    ) as refused:
        await accounts.check(alice, TOKENS)
    assert refused.value.retry_after_s == 20
    assert refused.value.details == {
        "tenant": "alice", "resource": "tokens", "used": "12", "allowed": "10", "renews_in_s": "20",
    }  # fmt: skip
    await accounts.check(BOB, TOKENS)
    clock.now_s = 1_020.0
    await accounts.flush({"alice": alice}.get)
    clock.now_s = 1_080.0
    await accounts.check(alice, TOKENS)


async def test_tokens_counted_by_one_gateway_are_refused_by_another_and_after_a_restart() -> None:
    bucket, alice = MemoryBucket(), holder(tokens=10)
    first, second = Accounts(bucket, Clock()), Accounts(bucket, Clock())
    for accounts in (first, second):
        accounts.count(alice, TOKENS, 5)
    await asyncio.gather(*(accounts.flush({"alice": alice}.get) for accounts in (first, second)))
    for accounts in (first, second, Accounts(bucket, Clock())):
        assert await accounts.used(alice) == {TOKENS: 10}
        with pytest.raises(QuotaUsedUp):
            await accounts.check(alice, TOKENS)


async def test_of_two_gateways_that_reserve_the_last_bytes_one_refuses() -> None:
    bucket, alice = MemoryBucket(), holder(bytes=1000)
    gateways = [Accounts(bucket, Clock()), Accounts(bucket, Clock())]
    tried = [gateways[n % 2].reserve(alice, BYTES, {f"sha256:{n:064x}"[::-1]: 300}) for n in range(10)]
    ends = await asyncio.gather(*tried, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, QuotaUsedUp)]
    assert ends.count(None) == 3 and len(refused) == 7
    assert "used 900 of 1,000 bytes stored in 60 s, and this needs 300 more" in refused[0].message


async def test_files_that_belong_together_are_charged_all_or_none_and_the_refusal_tells_their_sum() -> None:
    """Also a file that was charged for less than it has now: saying a small size first makes nothing cheap."""
    accounts, alice = Accounts(MemoryBucket(), Clock()), holder(bytes=100)
    with pytest.raises(QuotaUsedUp, match="these 3 files need 120 more, of which nothing was charged"):
        await accounts.reserve(alice, BYTES, {"sha256:a": 20, "sha256:b": 50, "sha256:c": 50})
    assert await accounts.used(alice) == {BYTES: 0}
    await accounts.reserve(alice, BYTES, {"sha256:a": 20, "sha256:b": 50})
    await accounts.reserve(alice, BYTES, {"sha256:a": 20})
    assert await accounts.used(alice) == {BYTES: 70}
    with pytest.raises(QuotaUsedUp, match="this needs 80 more"):
        await accounts.reserve(alice, BYTES, {"sha256:a": 100})


async def test_a_charge_counts_once_a_window_and_its_growth_in_the_next() -> None:
    """A job holds GPUs across the end of a window: each window gets the seconds that fell into it."""
    clock, alice = Clock(), holder(gpu=100, bytes=100)
    accounts = Accounts(MemoryBucket(), clock)
    for seconds in (10, 30, 30):
        await accounts.settle(alice, GPU, {"job-1": seconds})
    for _ in range(2):
        await accounts.reserve(alice, BYTES, {"job-1": 80})
    assert await accounts.used(alice) == {GPU: 30, BYTES: 80}
    await accounts.settle(alice, BYTES, {"job-1": 0, "sha256:a": 50, "sha256:b": 10})
    assert (await accounts.used(alice))[BYTES] == 60
    clock.now_s += 60
    assert await accounts.used(alice) == {GPU: 0, BYTES: 0}
    await accounts.settle(alice, GPU, {"job-1": 45})
    await accounts.reserve(alice, BYTES, {"sha256:a": 50})
    assert await accounts.used(alice) == {GPU: 15, BYTES: 0}


async def test_an_account_stays_below_what_a_bucket_takes() -> None:
    """Of more charges than are kept the sum stays, and the newest are known."""
    bucket, alice, count = MemoryBucket(), holder(bytes=10**9, gpu=10**9), limits.TENANT_CHARGES_MAX
    clock = Clock()
    accounts = Accounts(bucket, clock)
    for window in range(2):
        charges = {f"{window}-{n:020d}--": 123_456.789 for n in range(count + 10)}
        for resource in (BYTES, GPU):
            await accounts.settle(alice, resource, charges)
        assert (await accounts.used(alice))[BYTES] == pytest.approx(sum(charges.values()))
        clock.now_s += 60
    (entry,) = await bucket.entries()
    assert len(entry.value) < limits.KV_VALUE_MAX_BYTES
    assert len(json.loads(entry.value)[BYTES]["charges"]) == count
