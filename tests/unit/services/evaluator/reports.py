"""Reports made from verdicts, for tests about gates and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from services.evaluator.records import Sample
from services.evaluator.report import store_report
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite, find_suite
from smeltkit.blobs.local import LocalStore
from smeltkit.ids import digest_bytes

BUNDLE = digest_bytes(b"bundle")
OTHER_BUNDLE = digest_bytes(b"another bundle")


def make_sample(problem: str, verdict: str = "passed", *, sample: int = 0, reply: str = "reply") -> Sample:
    """A sample with this verdict."""
    return Sample(
        problem=problem,
        sample=sample,
        seed=sample,
        reply=reply,
        finish_reason="stop",
        prompt_tokens=10,
        completion_tokens=5,
        max_tokens=512,
        program="program",
        join="append",
        is_trimmed=False,
        verdict=verdict,
        detail="",
        facts={},
    )


def make_samples(problems: int, passed: int) -> list[Sample]:
    """One sample a problem, of which the first `passed` pass."""
    return [make_sample(f"P/{index}", "passed" if index < passed else "wrong") for index in range(problems)]


def make_settings(suite: Suite, samples: int = 1, problems: int = 0) -> Settings:
    """Greedy settings, or sampled ones for several samples."""
    temperature = 0.8 if samples > 1 else 0
    return Settings.checked(
        suite, samples=samples, temperature=temperature, top_p=0, seed=1, max_tokens=0, limit=problems
    )


def make_report(
    folder: Path,
    passed: int = 100,
    *,
    suite: str = "basic",
    problems: int = 0,
    bundle: str = BUNDLE,
    samples: Sequence[Sample] = (),
) -> tuple[LocalStore, str]:
    """A stored report over a shipped suite, and the store that has it."""
    found, store = find_suite(suite), LocalStore(folder)
    kept = list(samples) or make_samples(problems or found.problems, passed)
    provenance = {"bundle": bundle, "suite": found.digest, "data": found.data.digest, "trace": ""}
    digest = store_report(
        store,
        found,
        make_settings(found),
        kept,
        used={},
        provenance=provenance,
        times={"generate_s": 1.0, "total_s": 2.0},
    )
    return store, digest
