"""Records of samples, and the batches in which an attempt stores them so that the next one goes on from there.

A batch is a blob, and a reference `evaluations/<key>/<fence>-<number>` leads to it; the key names everything that the
samples depend on, so attempts, and later jobs of the same evaluation, find them. Two attempts that overlap write under
different fences; of a sample that was stored twice the oldest counts, so nothing is scored twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from services.evaluator.ports import Attempt
from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import ReportMismatch
from smeltkit.manifest import canonical_json

INFRA = "infra"
PASSED = "passed"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample: what was generated, what was judged, what came of it."""

    problem: str
    sample: int
    seed: int
    reply: str
    """The completion as generated."""
    finish_reason: str
    """"stop", "length", or "none" where the prompt left no room for an answer."""
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    """Limit in force; below the evaluation's where the context held no more."""
    program: str
    join: str
    is_trimmed: bool
    verdict: str
    detail: str
    facts: Mapping[str, Any]
    """What the judge measured."""

    @property
    def has_passed(self) -> bool:
        """Whether the judge passed it."""
        return self.verdict == PASSED

    @classmethod
    def from_dict(cls, value: Any) -> Sample:
        """The sample of JSON values; ReportMismatch if it is none."""
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(cls)}:
            raise ReportMismatch("a stored record of a sample is malformed")
        return cls(**value)


Samples = dict[tuple[str, int], Sample]


def to_lines(samples: Iterable[Sample]) -> bytes:
    """Samples as lines of canonical JSON."""
    return b"".join(canonical_json(asdict(sample)) + b"\n" for sample in samples)


def from_lines(data: bytes) -> list[Sample]:
    """The samples of lines of JSON."""
    return [Sample.from_dict(_json(line)) for line in data.splitlines()]


class Batches:
    """Stored samples of one evaluation, written by one attempt."""

    def __init__(self, store: Store, key: str, attempt: Attempt) -> None:
        self._store, self._attempt = store, attempt
        self._prefix = f"evaluations/{key}/"
        self._waiting: list[Sample] = []
        self._count = 0
        self._since = time.monotonic()
        self._lock = asyncio.Lock()
        self.generate_s = 0.0
        """Seconds of generation, wall clock, of everything stored; over all attempts."""
        self.used: Mapping[str, Any] = {}
        """What served the samples; stored beside them."""

    async def load(self) -> Samples:
        """What earlier attempts stored. To be called before the first `add`."""
        found: Samples = {}
        for data in await asyncio.to_thread(self._read):
            value = _json(data)
            self.generate_s += value["generate_s"]
            self.used = value["used"]
            for entry in value["samples"]:
                sample = Sample.from_dict(entry)
                found.setdefault((sample.problem, sample.sample), sample)
        self._since = time.monotonic()
        return found

    def add(self, sample: Sample) -> None:
        """Takes a sample; `settle` stores it."""
        self._waiting.append(sample)

    async def settle(self, *, is_last: bool = False) -> None:
        """Stores what waits if it is a batch, old enough, or the last. Safe to repeat after a failure.

        Raises what `check_alive` raises if this attempt may not store.
        """
        async with self._lock:
            batch, now = list(self._waiting), time.monotonic()
            is_old = now - self._since >= limits.EVALUATION_BATCH_PERIOD_S
            if not batch or not (is_last or is_old or len(batch) >= limits.EVALUATION_BATCH_SAMPLES):
                return
            await self._attempt.check_alive()
            elapsed_s = round(now - self._since, 3)
            value = {"generate_s": elapsed_s, "used": self.used, "samples": [asdict(sample) for sample in batch]}
            name = f"{self._prefix}{self._attempt.fence:020d}-{self._count:06d}"
            await asyncio.to_thread(self._write, name, canonical_json(value))
            del self._waiting[: len(batch)]
            self._count += 1
            self._since = now
            self.generate_s += elapsed_s

    def _write(self, name: str, data: bytes) -> None:
        self._store.put_ref(name, self._store.put_bytes(data))

    def _read(self) -> list[bytes]:
        digests = [self._store.get_ref(name) for name in self._store.list_refs(self._prefix)]
        return [self._store.get_bytes(digest) for digest in digests if digest is not None]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise ReportMismatch(f"a stored record of samples is no JSON: {error}") from error
