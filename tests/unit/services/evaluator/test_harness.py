"""The four phases against services on real sockets that do what the test says: order, bounds, honesty."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness_rig import FakeAttempt, Rig, even_only, many_rows, right, verdicts_of
from smelt.sandbox.v1 import sandbox_pb2
from suite_files import HUMANEVAL_ROWS, MBPP_ROWS

from services.evaluator.inference_client import InferenceClient
from services.evaluator.ports import Completion, Generation
from smeltkit import limits
from smeltkit.errors import EngineUnavailable, ModelReloaded, ReferenceRateTooLow, ScoreWithheld, SettingsDiffer
from smeltkit.ids import digest_bytes
from smeltkit.testing.evaluation import FakeInference, FakeSandbox
from smeltkit.testing.waiting import eventually


async def test_samples_come_in_the_order_of_the_problems_with_reply_and_verdict(tmp_path: Path) -> None:
    """R-090: the raw reply is kept beside the program. R-034: each has its finish reason."""
    outcome = await Rig(tmp_path, FakeInference(right)).run()
    assert verdicts_of(outcome) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]
    first = outcome.samples[0]
    assert (first.reply, first.join, first.finish_reason) == ("    return 2 * x\n", "append", "stop")
    assert first.program.endswith("    return 2 * x\n")
    assert outcome.used["engine"]["digest"] == FakeInference(right).engine_digest


async def test_a_chat_suite_is_asked_as_messages_and_judged_after_its_setup(tmp_path: Path) -> None:
    def answer(prompt: str, seed: int) -> str:
        code = MBPP_ROWS[0 if "assert add" in prompt else 1]["code"]
        return f"Sure:\n```python\n{code}\n```\n"

    rig = Rig(tmp_path, FakeInference(answer), rows=list(MBPP_ROWS), format="mbpp")
    assert verdicts_of(await rig.run()) == [("Mbpp/11", "passed"), ("Mbpp/12", "passed")]
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
