"""Keys under which results are found again: what changes a sample changes the key, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.evaluator.ports import JudgeInfo
from services.evaluator.settings import Settings
from services.evaluator.spec import evaluation_key, is_batch_variant, references_key
from services.evaluator.suites import find_suite
from smeltkit.ids import digest_bytes
from smeltkit.jobs.stages import StageCache
from smeltkit.testing.bus import MemoryBus

SUITE = find_suite("basic")
JUDGE = JudgeInfo(digest=digest_bytes(b"judge"), level="jail", slots=2, cpu="a CPU")


async def _exists(digest: str) -> bool:
    return True


def key(**change: Any) -> str:
    """The key of one evaluation, some of whose parts are others."""
    asked: dict[str, Any] = {"samples": 1, "temperature": 0, "top_p": 0, "seed": 0, "max_tokens": 0, "limit": 0}
    asked |= {name: change.pop(name) for name in list(change) if name in asked}
    parts = {"bundle": digest_bytes(b"bundle"), "engine_digest": digest_bytes(b"engine"), "concurrency": 1, **change}
    stages = StageCache(MemoryBus(), _exists, revision="r")
    return evaluation_key(stages, suite=SUITE, settings=Settings.checked(SUITE, **asked), judge=JUDGE, **parts)


def test_a_batched_result_is_not_served_for_an_unbatched_request() -> None:
    """R-040, R-096: whether requests share steps decides the last bits, so it is part of the key; how many does not."""
    assert not is_batch_variant(1) and is_batch_variant(2)
    assert key(concurrency=1) != key(concurrency=2) == key(concurrency=256)


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": "another CPU"},
        {"digest": digest_bytes(b"other")},
        {"level": "confined"},
        {"profiles": {"bare": digest_bytes(b"other packages")}},
    ],
    ids=str,
)
def test_references_measured_on_another_node_or_judge_are_others(change: dict[str, Any]) -> None:
    """R-085: limits scale from what the references take on the CPU that judges; slots do not matter."""
    stages = StageCache(MemoryBus(), _exists, revision="r")
    assert references_key(stages, SUITE, replace(JUDGE, slots=64)) == references_key(stages, SUITE, JUDGE)
    assert references_key(stages, SUITE, replace(JUDGE, **change)) != references_key(stages, SUITE, JUDGE)


@pytest.mark.parametrize(
    "change",
    [{"bundle": digest_bytes(b"other")}, {"engine_digest": digest_bytes(b"other")}, {"seed": 1}, {"max_tokens": 9}],
    ids=str,
)
def test_another_bundle_engine_or_setting_is_another_evaluation(change: dict[str, Any]) -> None:
    """R-096."""
    assert key(**change) != key()
