"""The harness when something dies or is away: attempts that follow, infrastructure errors, outages, refusals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from harness_rig import FakeAttempt, Rig, even_only, many_rows, right, verdicts_of
from smelt.sandbox.v1 import sandbox_pb2
from suite_files import HUMANEVAL_ROWS

from services.evaluator import retry
from services.evaluator.ports import Limits
from services.evaluator.references import candidate_of, run_references
from services.evaluator.sandbox_client import SandboxClient
from smeltkit import limits
from smeltkit.errors import BadCode, EngineUnavailable, LeaseLost, ScoreWithheld, ServiceUnavailable
from smeltkit.rpc.channel import open_channel
from smeltkit.servers import free_ports
from smeltkit.testing.evaluation import FakeInference, FakeSandbox, serving_fakes


@pytest.fixture
def short_outages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of a fraction of a second."""
    monkeypatch.setattr(limits, "EVALUATION_BACKOFF_S", (0.01,))
    monkeypatch.setitem(retry.patiently.__kwdefaults__, "outage_max_s", 0.3)


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
    assert verdicts_of(outcome) == [(f"Many/{index}", "wrong" if index % 2 else "passed") for index in range(30)]


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
    assert verdicts_of(await rig.run(references=references)) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]


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
    assert verdicts_of(outcome) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]


async def test_short_outages_are_waited_out(tmp_path: Path, short_outages: None) -> None:
    failures = [EngineUnavailable("the engine died"), ServiceUnavailable("not yet")]
    rig = Rig(tmp_path, FakeInference(right, failures=list(failures)))
    assert verdicts_of(await rig.run()) == [("Tiny/0", "passed"), ("Tiny/1", "wrong")]
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


async def test_a_candidate_that_is_refused_ends_its_own_verdict_alone(tmp_path: Path) -> None:
    """The refusal is raised with its reason; what is judged beside it on the same stream goes on."""
    rig = Rig(tmp_path, FakeInference(right), sandbox=FakeSandbox(refused_on="# no"))
    program, bounds = HUMANEVAL_ROWS[0]["prompt"] + "    return 2 * x\n", Limits(cpu_s=1.0, wall_s=5.0)
    _, task = rig.suite()
    candidates = [candidate_of(task.problems[0], program + rest, bounds) for rest in ("", "# no", "")]
    async with rig.clients() as (_, judge):
        found = await asyncio.gather(*map(judge.judge, candidates), return_exceptions=True)
    assert [getattr(one, "verdict", type(one)) for one in found] == ["passed", BadCode, "passed"]
