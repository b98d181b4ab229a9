"""Batches of samples: stored once, found again, whole after a failure of the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from reports import make_sample

from services.evaluator.records import Batches, from_lines, to_lines
from smeltkit import limits
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import ReportMismatch, StoreUnavailable


@dataclass
class Attempt:
    """An attempt that is alive."""

    fence: int

    async def progress(self, phase: str, done: int, total: int, unit: str = "", message: str = "") -> None:
        return

    async def check_alive(self) -> None:
        return


class FailingStore(LocalStore):
    """A store that refuses its next `failures` references."""

    failures = 0

    def put_ref(self, name: str, digest: str) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("away")
        super().put_ref(name, digest)


async def test_a_sample_waits_for_its_batch_and_is_found_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    batches = Batches(store, "key", Attempt(1))
    for index in range(limits.EVALUATION_BATCH_SAMPLES - 1):
        batches.add(make_sample(f"P/{index}"))
        await batches.settle()
    assert not list(store.list_refs("evaluations/"))
    batches.add(make_sample("P/last"))
    await batches.settle()
    assert len(list(store.list_refs("evaluations/key/"))) == 1
    assert len(await Batches(store, "key", Attempt(2)).load()) == limits.EVALUATION_BATCH_SAMPLES
    assert await Batches(store, "other", Attempt(2)).load() == {}


async def test_storing_again_after_a_failure_stores_every_sample_once(tmp_path: Path) -> None:
    store = FailingStore(tmp_path)
    batches = Batches(store, "key", Attempt(1))
    batches.used = {"engine": "e"}
    batches.add(make_sample("P/0"))
    store.failures = 1
    with pytest.raises(StoreUnavailable):
        await batches.settle(is_last=True)
    await batches.settle(is_last=True)
    await batches.settle(is_last=True)
    again = Batches(store, "key", Attempt(2))
    assert list(await again.load()) == [("P/0", 0)]
    assert again.used == {"engine": "e"}
    assert len(list(store.list_refs("evaluations/key/"))) == 1


async def test_of_a_sample_stored_twice_the_oldest_counts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for fence, verdict in ((20, "wrong"), (3, "passed")):
        batches = Batches(store, "key", Attempt(fence))
        batches.add(make_sample("P/0", verdict))
        await batches.settle(is_last=True)
    assert (await Batches(store, "key", Attempt(30)).load())["P/0", 0].verdict == "passed"


def test_records_survive_the_round_trip_whatever_a_reply_holds() -> None:
    samples = [make_sample("P/0", reply="\u2028\x0c\r\n\U0001f600\x00"), make_sample("P/1", reply="")]
    assert from_lines(to_lines(samples)) == samples


async def test_a_malformed_batch_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_ref("evaluations/key/1", store.put_bytes(b"{"))
    with pytest.raises(ReportMismatch, match="no JSON"):
        await Batches(store, "key", Attempt(1)).load()
