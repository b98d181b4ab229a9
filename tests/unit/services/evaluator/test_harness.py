"""The four phases against services on real sockets that do what the test says: order, resumption, outages, honesty."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from smelt.sandbox.v1 import sandbox_pb2
from suite_files import HUMANEVAL_ROWS, MBPP_ROWS, Row, make_suite

from services.evaluator import retry
from services.evaluator.harness import Harness, Outcome, Task
from services.evaluator.inference_client import InferenceClient
from services.evaluator.ports import Completion, Generation
from services.evaluator.prompts import build_prompts
from services.evaluator.records import Batches
from services.evaluator.references import References, run_references
from services.evaluator.sandbox_client import SandboxClient
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.blobs.local import LocalStore
from smeltkit.errors import (
    EngineUnavailable,
    LeaseLost,
    ModelReloaded,
    ReferenceRateTooLow,
    ScoreWithheld,
    ServiceUnavailable,
    SettingsDiffer,
)
from smeltkit.ids import digest_bytes
from smeltkit.rpc.channel import open_channel
from smeltkit.servers import free_ports
from smeltkit.testing.evaluation import FakeInference, FakeSandbox, serving_fakes
from smeltkit.testing.waiting import eventually

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


@pytest.fixture
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of a fraction of a second."""
    monkeypatch.setattr(limits, "EVALUATION_BACKOFF_S", (0.01,))
    monkeypatch.setitem(retry.patiently.__kwdefaults__, "outage_max_s", 0.3)


def _verdicts(outcome: Outcome) -> list[tuple[str, str]]:
    return [(sample.problem, sample.verdict) for sample in outcome.samples]


async def test_samples_come_in_the_order_of_the_problems_with_reply_and_verdict(tmp_path: Path) -> None:
    """R-090: the raw reply is kept beside the program. R-034: each has its finish reason."""
    outcome = await Rig(tmp_path, FakeInference(right)).run()
    assert _verdicts(outcome) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]
    first = outcome.samples[0]
    assert (first.reply, first.join, first.finish_reason) == ("    return 2 * x\n", "append", "stop")
    assert first.program.endswith("    return 2 * x\n")
    assert outcome.used["engine"]["digest"] == FakeInference(right).engine_digest


async def test_a_chat_suite_is_asked_as_messages_and_judged_after_its_setup(tmp_path: Path) -> None:
    def answer(prompt: str, seed: int) -> str:
        code = MBPP_ROWS[0 if "assert add" in prompt else 1]["code"]
        return f"Sure:\n```python\n{code}\n```\n"

    rig = Rig(tmp_path, FakeInference(answer), rows=list(MBPP_ROWS), format="mbpp")
    assert _verdicts(await rig.run()) == [("Mbpp/11", "passed"), ("Mbpp/12", "passed")]
    assert {candidate.setup for candidate in rig.sandbox.judged} == {"", "head = Node(3)"}


async def test_the_time_allowed_follows_the_pace_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-039: the first completion has the time of the slowest engine admitted, later ones that of this engine."""
    allowed: list[float] = []
    generate = InferenceClient.generate

    async def spy(client: InferenceClient, generation: Generation) -> Completion:
        allowed.append(generation.timeout_s)
        return await generate(client, generation)

    monkeypatch.setattr(InferenceClient, "generate", spy)
    words = " ".join(["# word"] * limits.EVALUATION_PACE_TOKENS_MIN)
    rig = Rig(tmp_path, FakeInference(lambda prompt, seed: words), rows=many_rows(3), concurrency=1)
    outcome = await rig.run()
    first_s, budget = limits.EVALUATION_FIRST_TOKEN_S, 64
    assert allowed[0] == first_s + limits.EVALUATION_TOKEN_S * budget
    assert first_s < allowed[1] <= allowed[2] <= first_s + limits.EVALUATION_PACE_FACTOR * outcome.token_s * budget


async def test_a_model_that_is_loaded_for_each_item_ends_the_evaluation(tmp_path: Path) -> None:
    """R-098: an error that another attempt would only repeat; one load for all items is what is counted otherwise."""
    rows = many_rows(2 * limits.EVALUATION_LOADS_MAX)
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    assert (await Rig(tmp_path / "one", FakeInference(even_only), rows=rows).run()).loads == 1
    rig = Rig(tmp_path / "many", FakeInference(even_only, reloads_each_time=True), rows=rows)
    with pytest.raises(ModelReloaded, match="was loaded 5 times") as caught:
        await rig.run()
    assert not caught.value.retryable


async def test_several_replicas_may_each_load_the_model(tmp_path: Path) -> None:
    """R-098: each of them once is no load for each item."""
    replicas = 2 * limits.EVALUATION_LOADS_MAX
    rig = Rig(tmp_path, FakeInference(even_only, replicas=replicas), rows=many_rows(2 * replicas))
    assert (await rig.run()).loads == replicas


async def test_references_are_judged_several_times_before_anything_is_generated(tmp_path: Path) -> None:
    """R-086."""
    rig = Rig(tmp_path, FakeInference(right))
    attempt = FakeAttempt()
    await rig.run(attempt)
    phases = [phase for phase, _, _ in attempt.told]
    assert phases.index("generate") > max(index for index, phase in enumerate(phases) if phase == "references")
    programs = [candidate.code.decode() for candidate in rig.sandbox.judged]
    assert programs.count(HUMANEVAL_ROWS[0]["prompt"] + "    return 2 * x\n") == limits.EVALUATION_REFERENCE_RUNS + 1


async def test_a_suite_whose_references_fail_is_refused_and_nothing_is_generated(tmp_path: Path) -> None:
    """R-086."""
    rig = Rig(tmp_path, FakeInference(right), sandbox=FakeSandbox(forced=[sandbox_pb2.VERDICT_TIMEOUT_CPU]))
    with pytest.raises(ReferenceRateTooLow, match=r"1 of 2 reference solutions of tiny pass.*timeout-cpu"):
        await rig.run()
    assert not rig.inference.asked


async def test_a_sandbox_that_fails_on_a_reference_gives_no_reference_record(tmp_path: Path) -> None:
    infra = [sandbox_pb2.VERDICT_INFRA] * 20
    rig = Rig(tmp_path, FakeInference(right), sandbox=FakeSandbox(slots=1, forced=infra))
    with pytest.raises(ScoreWithheld, match="the sandbox failed on the reference of Tiny/"):
        await rig.run()


async def test_limits_grow_with_the_cpu_time_of_the_reference_here(tmp_path: Path) -> None:
    """R-085: eight times the worst of the reference's runs, 2 to 60 s; wall time far above it."""
    rig = Rig(tmp_path, FakeInference(right), sandbox=FakeSandbox(cpu_s=1.5))
    references = await rig.references()
    assert (references.limits_of("Tiny/0").cpu_s, references.limits_of("Tiny/0").wall_s) == (12.0, 82.0)
    quick, slow = replace(references, cpu_s={"Tiny/0": 0.001}), replace(references, cpu_s={"Tiny/0": 100.0})
    assert (quick.limits_of("Tiny/0").cpu_s, slow.limits_of("Tiny/0").cpu_s) == (2.0, 60.0)
    await rig.run(references=references)
    assert rig.sandbox.judged[-1].limits.cpu_s == 12.0
    assert rig.sandbox.judged[-1].rerun


async def test_generation_keeps_its_concurrency(tmp_path: Path) -> None:
    rig = Rig(tmp_path, FakeInference(even_only, delay_s=0.02), rows=many_rows(30), concurrency=5)
    await rig.run()
    assert rig.inference.most_running == 5


async def test_the_judge_works_while_generation_goes_on(tmp_path: Path) -> None:
    """EVL-28: with one completion at a time, verdicts come in before the last one is generated."""
    rig = Rig(tmp_path, FakeInference(even_only, delay_s=0.02), rows=many_rows(10), concurrency=1)
    references = await rig.references()
    rig.sandbox.judged.clear()
    running = asyncio.create_task(rig.run(references=references))
    await eventually(lambda: len(rig.inference.asked) >= 9)
    assert len(rig.sandbox.judged) >= 6
    await running


async def test_samples_of_a_problem_have_seeds_of_their_own(tmp_path: Path) -> None:
    seeds: list[int] = []

    def remember(prompt: str, seed: int) -> str:
        seeds.append(seed)
        return right(prompt, seed)

    settings = {"samples": 3, "temperature": 0.8, "seed": 5}
    outcome = await Rig(tmp_path, FakeInference(remember), settings=settings).run()
    assert [(sample.problem, sample.sample) for sample in outcome.samples] == [
        (f"Tiny/{problem}", sample) for problem in range(2) for sample in range(3)
    ]
    assert sorted(seeds) == sorted(sample.seed for sample in outcome.samples)
    assert len(set(seeds)) == 6


@pytest.mark.parametrize(
    "change", [{"max_tokens": 32}, {"model": digest_bytes(b"other")}, {"dropped_tokens": 3}], ids=str
)
async def test_settings_that_were_not_used_are_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    """R-007."""
    with pytest.raises(SettingsDiffer, match=f"{next(iter(change))}=.* was requested"):
        await Rig(tmp_path, FakeInference(right, change=change)).run()


async def test_an_engine_that_changes_during_the_run_ends_the_attempt(tmp_path: Path) -> None:
    change = {"engine_digest": digest_bytes(b"new engine")}
    with pytest.raises(EngineUnavailable, match="changed during the evaluation"):
        await Rig(tmp_path, FakeInference(right, change=change)).run()


async def test_a_prompt_that_leaves_less_room_gets_the_room_there_is(tmp_path: Path) -> None:
    """The shortened limit is recorded; a prompt that leaves none is a sample without code, not a crash."""
    outcome = await Rig(tmp_path, FakeInference(right, context_tokens=17)).run()
    double, root = outcome.samples
    assert (double.max_tokens, double.finish_reason, double.verdict) == (8, "stop", "passed")
    assert (root.max_tokens, root.finish_reason, root.reply) == (0, "none", "")
    assert root.verdict != "passed"


async def test_a_second_attempt_generates_only_what_the_first_did_not_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing twice, nothing lost: the first attempt loses its lease after two stored batches."""
    monkeypatch.setattr(limits, "EVALUATION_BATCH_SAMPLES", 4)
    rig = Rig(tmp_path, FakeInference(even_only), rows=many_rows(30))
    references = await rig.references()
    with pytest.raises(LeaseLost):
        await rig.run(FakeAttempt(fence=1, dies_after=2), references=references)
    first = set(rig.inference.asked)
    rig.inference.asked.clear()
    outcome = await rig.run(FakeAttempt(fence=2), references=references)
    assert 8 <= outcome.resumed < 30
    assert len(rig.inference.asked) == 30 - outcome.resumed
    assert first | set(rig.inference.asked) == {f"Many/{index}-0" for index in range(30)}
    assert _verdicts(outcome) == [(f"Many/{index}", "wrong" if index % 2 else "passed") for index in range(30)]


async def test_a_finished_run_is_found_again_whole(tmp_path: Path) -> None:
    """R-096: nothing is generated and nothing is judged again."""
    rig = Rig(tmp_path, FakeInference(right))
    references = await rig.references()
    before = await rig.run(references=references)
    rig.inference.asked.clear()
    rig.sandbox.judged.clear()
    after = await rig.run(FakeAttempt(fence=2), references=references)
    assert (after.samples, after.used, after.resumed) == (before.samples, before.used, 2)
    assert not rig.inference.asked
    assert not rig.sandbox.judged


async def test_two_attempts_that_overlap_score_no_sample_twice(tmp_path: Path) -> None:
    """Of a sample that both stored, the older one counts, whoever asks."""
    rig = Rig(tmp_path, FakeInference(even_only), rows=many_rows(12))
    references = await rig.references()
    await asyncio.gather(*(rig.run(FakeAttempt(fence=fence), references=references) for fence in (1, 2)))
    outcome = await rig.run(FakeAttempt(fence=3), references=references)
    assert [sample.problem for sample in outcome.samples] == [f"Many/{index}" for index in range(12)]
    assert outcome.resumed == 12


async def test_an_infrastructure_error_is_judged_again_and_never_a_fail(tmp_path: Path) -> None:
    """R-088."""
    rig = Rig(tmp_path, FakeInference(right))
    references = await rig.references()
    rig.sandbox.forced = [sandbox_pb2.VERDICT_INFRA] * 2
    assert _verdicts(await rig.run(references=references)) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]


async def test_infrastructure_errors_that_stay_withhold_the_score_and_keep_the_rest(tmp_path: Path) -> None:
    """R-088: the next attempt judges only what is missing."""
    rig = Rig(tmp_path, FakeInference(right))
    references = await rig.references()
    rig.sandbox.broken_on = "return 2 * x"
    with pytest.raises(ScoreWithheld, match="the sandbox failed on 1 of 2 samples"):
        await rig.run(references=references)
    rig.sandbox.broken_on = ""
    rig.inference.asked.clear()
    outcome = await rig.run(FakeAttempt(fence=2), references=references)
    assert (outcome.resumed, sum(rig.inference.asked.values())) == (1, 1)
    assert _verdicts(outcome) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]


async def test_short_outages_are_waited_out(tmp_path: Path, short_outages: None) -> None:
    failures = [EngineUnavailable("the engine died"), ServiceUnavailable("not yet")]
    rig = Rig(tmp_path, FakeInference(right, failures=list(failures)))
    assert _verdicts(await rig.run()) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]
    assert not rig.inference.failures


async def test_an_inference_service_that_stays_away_is_a_retryable_error(tmp_path: Path, short_outages: None) -> None:
    rig = Rig(tmp_path, FakeInference(right, failures=[EngineUnavailable("the engine died")] * 10_000))
    with pytest.raises(ServiceUnavailable, match=r"generation: no success for 0\.3 s, last: the engine died") as caught:
        await rig.run()
    assert caught.value.retryable


async def test_a_sandbox_that_comes_back_is_used_again(tmp_path: Path) -> None:
    """The stream of verdicts broke; what waited is asked again on a new one."""
    (port,), sandbox = free_ports(1), FakeSandbox()
    suite, task = Rig(tmp_path, FakeInference(right)).suite()
    async with open_channel(f"127.0.0.1:{port}") as channel, SandboxClient(channel) as judge:
        async with serving_fakes(None, sandbox, f"127.0.0.1:{port}"):
            info = await judge.describe()
            await run_references(suite, task.problems, judge, info, FakeAttempt())
        running = asyncio.create_task(run_references(suite, task.problems, judge, info, FakeAttempt()))
        await asyncio.sleep(0.3)
        async with serving_fakes(None, sandbox, f"127.0.0.1:{port}"):
            assert (await running).passed == 2
