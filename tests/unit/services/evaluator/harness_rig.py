"""A rig for the harness: fakes on real sockets, a store, a tiny suite and models that answer as a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite_files import HUMANEVAL_ROWS, Row, make_suite

from services.evaluator.harness import Harness, Outcome, Task
from services.evaluator.inference_client import InferenceClient
from services.evaluator.prompts import build_prompts
from services.evaluator.records import Batches
from services.evaluator.references import References, run_references
from services.evaluator.sandbox_client import SandboxClient
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import LeaseLost
from smeltkit.ids import digest_bytes
from smeltkit.rpc.channel import open_channel
from smeltkit.testing.evaluation import FakeInference, FakeSandbox, serving_fakes

BUNDLE = digest_bytes(b"bundle")


@dataclass
class FakeAttempt:
    """An attempt that remembers what it was told; `dies_after` effects it has lost its lease."""

    fence: int = 1
    dies_after: int = 1_000_000
    told: list[tuple[str, int, int]] = field(default_factory=list)

    async def progress(self, phase: str, done: int, total: int, unit: str = "", message: str = "") -> None:
        self.told.append((phase, done, total))

    async def check_alive(self) -> None:
        self.dies_after -= 1
        if self.dies_after < 0:
            raise LeaseLost("somebody else has the job")


def right(prompt: str, seed: int) -> str:
    """A model that doubles well and takes roots badly."""
    return "    return 2 * x\n" if "double" in prompt else "    return x\n"


def many_rows(count: int) -> list[Row]:
    """Problems that ask for x times their number."""
    return [
        {
            "task_id": f"Many/{index}",
            "prompt": f'def times{index}(x):\n    """Return x times {index}."""\n',
            "entry_point": f"times{index}",
            "canonical_solution": f"    return x * {index}\n",
            "test": f"def check(candidate):\n    assert candidate(3) == {3 * index}\n",
        }
        for index in range(count)
    ]


def even_only(prompt: str, seed: int) -> str:
    """A model that is right on even numbers."""
    index = int(prompt.split("times ")[1].split(".")[0])
    return f"    return x * {index}\n" if index % 2 == 0 else "    return None\n"


@dataclass
class Rig:
    """Fakes, a store and a suite; `run` makes one attempt."""

    folder: Path
    inference: FakeInference
    sandbox: FakeSandbox = field(default_factory=FakeSandbox)
    rows: list[Row] = field(default_factory=lambda: list(HUMANEVAL_ROWS))
    format: str = "humaneval"
    settings: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 4

    def suite(self) -> tuple[Suite, Task]:
        suite, problems, _ = make_suite(self.folder, self.rows, self.format)
        asked = {"samples": 1, "temperature": 0, "top_p": 0, "seed": 0, "max_tokens": 0, "limit": 0, **self.settings}
        settings = Settings.checked(suite, **asked)
        prompts = build_prompts(suite, problems)
        task = Task(
            bundle=BUNDLE,
            suite=suite,
            settings=settings,
            problems=problems,
            prompts=prompts,
            thinking=("<think>", "</think>"),
        )
        return suite, task

    async def run(self, attempt: FakeAttempt | None = None, *, references: References | None = None) -> Outcome:
        attempt = attempt or FakeAttempt()
        suite, task = self.suite()
        async with self.clients() as (inference, judge):
            info = await judge.describe()
            trusted = references or await run_references(suite, task.problems, judge, info, attempt)
            trusted.check_rate(suite)
            harness = Harness(
                task,
                trusted,
                inference=inference,
                judge=judge,
                engine=await inference.load(BUNDLE),
                judge_info=info,
                attempt=attempt,
                batches=Batches(LocalStore(self.folder / "store"), "key", attempt),
                concurrency=self.concurrency,
            )
            return await harness.run()

    async def references(self) -> References:
        suite, task = self.suite()
        async with self.clients() as (_, judge):
            return await run_references(suite, task.problems, judge, await judge.describe(), FakeAttempt())

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[InferenceClient, SandboxClient]]:
        async with (
            serving_fakes(self.inference, self.sandbox) as address,
            open_channel(address) as channel,
            SandboxClient(channel) as judge,
        ):
            yield InferenceClient(channel), judge


def verdicts_of(outcome: Outcome) -> list[tuple[str, str]]:
    """Problem and verdict of each sample."""
    return [(sample.problem, sample.verdict) for sample in outcome.samples]
