"""The evaluator as a process on real NATS and S3, with an inference service and a sandbox that the test controls."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from evaluator_rig import EvaluatorRig, evaluator_process, evaluator_rig
from nats.aio.msg import Msg
from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2

from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.errors import (
    BadManifest,
    BadRequest,
    BadSuite,
    BadTemplate,
    ReportMismatch,
    SmeltError,
    UnknownBlob,
    UnknownModel,
    UnknownSuite,
    UnsupportedOption,
)
from smeltkit.ids import digest_bytes
from smeltkit.manifest import REFERENCE_TYPE, REPORT_TYPE
from smeltkit.servers import free_ports
from smeltkit.testing.evaluation import FakeInference, FakeSandbox, serving_fakes
from smeltkit.testing.nats import NatsServer, nats_server
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server, fresh_store, s3_server
from smeltkit.testing.waiting import eventually

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "examples" / "data" / "basic.jsonl").read_text().splitlines()
]
DATA_DIR = Path(__file__).parents[3] / "shared" / "data"
ANSWERS = {" ".join(row["prompt"].split()): row["canonical_solution"] for row in ROWS[:150]}
"""What the model of these tests knows: 150 of 200."""


def answer(prompt: str, seed: int) -> str:
    """The reference of a known prompt, else a body that is wrong."""
    return ANSWERS.get(" ".join(prompt.split()), "    return object()\n")


@dataclass
class Rig:
    """A running evaluator, its caller and its fakes."""

    evaluator: EvaluatorRig
    process: ServiceProcess
    inference: FakeInference
    sandbox: FakeSandbox


@dataclass(frozen=True)
class Site:
    """Where an evaluator runs, and where it expects inference and sandbox."""

    platform: PlatformConfig
    process: ServiceProcess
    fakes_address: str


@contextmanager
def site(nats: NatsServer, s3: S3Server, folder: Path) -> Iterator[Site]:
    """An evaluator on these servers, in a bucket of its own."""
    asyncio.run(_apply_topology(nats.config))
    platform = replace(fresh_store(s3, folder / "uploads").config, nats_url=nats.url)
    fakes = f"127.0.0.1:{free_ports(1)[0]}"
    with evaluator_process(platform, folder, inference=fakes, sandbox=fakes) as process:
        yield Site(platform, process, fakes)


@asynccontextmanager
async def rig_at(place: Site, folder: Path) -> AsyncIterator[Rig]:
    """Fresh fakes, whose judge nobody has met before, and a bundle of this rig's own named `tested`."""
    inference, sandbox = FakeInference(answer), FakeSandbox(judge_digest=digest_bytes(uuid4().bytes))
    async with (
        serving_fakes(inference, sandbox, place.fakes_address),
        evaluator_rig(place.process.address, place.platform, folder / "uploads") as caller,
    ):
        await caller.put_bundle()
        yield Rig(evaluator=caller, process=place.process, inference=inference, sandbox=sandbox)


async def _apply_topology(settings: PlatformConfig) -> None:
    bus = await Bus.connect(settings, name="topology")
    await topology.apply(bus)
    await bus.close()


@pytest.fixture(scope="module")
def shared_site(nats: NatsServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One evaluator for this file's tests; one that kills it starts it again."""
    with site(nats, s3, tmp_path_factory.mktemp("evaluator")) as place:
        yield place


@pytest.fixture
async def rig(shared_site: Site, tmp_path: Path) -> AsyncIterator[Rig]:
    """A rig on the shared evaluator."""
    async with rig_at(shared_site, tmp_path) as made:
        yield made


async def test_an_evaluation_ends_with_a_report_of_every_digest(rig: Rig) -> None:
    """EVL-40: what a score rests on is named by digest, and requested equals effective (R-007). R-098: one load."""
    job = await rig.evaluator.start()
    reply = await rig.evaluator.report(job, with_samples=True)
    (score,) = reply.report.scores
    assert (score.suite, score.metric, score.passed, score.problems) == ("basic", "pass@1", 150, 200)
    assert score.low < score.value < score.high
    assert dict(reply.report.verdicts) == {"passed": 150, "wrong": 50}
    assert [sample.problem for sample in reply.samples] == [row["task_id"] for row in ROWS]
    assert reply.samples[0].reply == ROWS[0]["canonical_solution"]
    known = json.loads(reply.report.provenance_json)
    named = known["provenance"]
    assert (rig.inference.loads, named["model_loads"]) == (1, 1)
    digests = ("bundle", "tokenizer", "template", "contract", "suite", "data", "records", "references")
    assert all(named[name].startswith("sha256:") for name in digests)
    assert named["judge"]["digest"] == rig.sandbox.judge_digest
    assert known["settings"]["effective"]["engine"]["digest"] == rig.inference.engine_digest
    assert known["length_ended"] == known["infra"] == 0
    manifest = rig.evaluator.store.get_manifest(reply.report.digest)
    assert (manifest.artifact_type, manifest.subject) == (REPORT_TYPE, reply.report.bundle_digest)


async def test_the_same_evaluation_again_is_the_stored_result(rig: Rig) -> None:
    """R-096: not one completion and not one verdict more; more problems, or no batching, is another evaluation."""
    first = await rig.evaluator.end(await rig.evaluator.start(limit=20))
    asked, judged = sum(rig.inference.asked.values()), len(rig.sandbox.judged)
    again = await rig.evaluator.start(limit=20, concurrency=3)
    assert again.is_cached
    assert again.result_digest == first.result_digest
    assert (sum(rig.inference.asked.values()), len(rig.sandbox.judged)) == (asked, judged)
    assert not (await rig.evaluator.start(limit=20, concurrency=1)).is_cached
    other = await rig.evaluator.start(limit=21)
    assert not other.is_cached
    assert (await rig.evaluator.end(other)).result_digest != first.result_digest


async def test_a_result_of_another_engine_does_not_count(rig: Rig) -> None:
    first = await rig.evaluator.end(await rig.evaluator.start(limit=5))
    rig.inference.engine_digest = digest_bytes(b"newer engine")
    again = await rig.evaluator.start(limit=5)
    assert not again.is_cached
    assert (await rig.evaluator.end(again)).result_digest != first.result_digest


async def test_a_finished_evaluation_is_announced_once(rig: Rig) -> None:
    heard: list[event_pb2.EvaluationFinished] = []

    async def hear(message: Msg) -> None:
        heard.append(event_pb2.EvaluationFinished.FromString(message.data))

    async with rig.evaluator.bus.listen("smelt.evt.evaluator.evaluation.finished.default", hear):
        job = await rig.evaluator.end(await rig.evaluator.start(limit=20))
        event = await eventually(lambda: next((event for event in heard if event.job_id == job.id), None))
    assert (event.report_digest, event.suite, event.passed, event.total) == (job.result_digest, "basic", 20, 20)


async def test_references_give_a_record_that_is_no_score(rig: Rig) -> None:
    """R-087: another type of artifact, about no bundle, and no report."""
    spec = {"suite": "basic"}
    started = await rig.evaluator.ask("StartReferenceCheck", spec=spec, request_id=uuid4().hex)
    job = await rig.evaluator.end(started.job)
    manifest = rig.evaluator.store.get_manifest(job.result_digest)
    assert (manifest.artifact_type, manifest.subject) == (REFERENCE_TYPE, "")
    assert (manifest.config["passed"], manifest.config["total"]) == (200, 200)
    with pytest.raises(BadManifest, match="not a report"):
        await rig.evaluator.ask("GetReport", digest=job.result_digest)


async def test_references_are_judged_anew_on_another_cpu(rig: Rig) -> None:
    """R-085: times of one node set no limits on another; on the same one they are judged once."""
    first = await rig.evaluator.end(await rig.evaluator.start(limit=1))
    judged = len(rig.sandbox.judged)
    await rig.evaluator.end(await rig.evaluator.start(limit=2))
    assert len(rig.sandbox.judged) == judged + 2
    rig.sandbox.cpu = "another CPU"
    report = await rig.evaluator.report(await rig.evaluator.start(limit=3))
    assert len(rig.sandbox.judged) == 2 * judged + 2 + 2
    named = [json.loads(report.report.provenance_json), rig.evaluator.store.get_manifest(first.result_digest).config]
    records = [
        rig.evaluator.store.get_manifest(one["provenance"]["references"]).config["judge"]["cpu"] for one in named
    ]
    assert records == ["another CPU", "a CPU"]


async def test_references_that_fail_refuse_the_evaluation(rig: Rig) -> None:
    """R-086, R-105: the job fails with its reason; nothing was generated."""
    rig.sandbox.forced = [4] * 3
    job = await rig.evaluator.end(await rig.evaluator.start())
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert job.error.reason == "REFERENCE_RATE_TOO_LOW"
    assert not rig.inference.asked


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"suite": "humanevil"}, UnknownSuite),
        ({"bundle": "nobody"}, UnknownModel),
        ({"data_digest": digest_bytes(b"other")}, BadSuite),
        ({"samples": 2}, BadRequest),
        ({"concurrency": 257}, BadRequest),
        ({"limit": 201, "bundle": "of a later stage"}, BadRequest),
        ({"suite": "humaneval"}, UnknownBlob),
    ],
    ids=["suite", "bundle", "data", "greedy samples", "concurrency", "limit", "no data"],
)
async def test_a_request_that_can_not_work_is_refused_at_once(
    spec: dict[str, Any], error: type[SmeltError], rig: Rig
) -> None:
    with pytest.raises(error):
        await rig.evaluator.start(**spec)


async def test_a_plan_lists_every_refusal_and_starts_nothing(rig: Rig) -> None:
    await rig.evaluator.put_bundle(has_template=False)
    spec = {"bundle": "tested", "suite": "mbpp", "max_tokens": 2048}
    plan = (await rig.evaluator.ask("PlanEvaluation", spec=spec)).plan
    assert [refusal.reason for refusal in plan.refusals] == ["PROMPT_TOO_LONG", "BAD_TEMPLATE", "UNKNOWN_BLOB"]
    with pytest.raises(BadTemplate):
        await rig.evaluator.start(suite="mbpp")
    spec = {"bundle": "tested", "suite": "basic", "samples": 4, "temperature": 0.8}
    plan = (await rig.evaluator.ask("PlanEvaluation", spec=spec)).plan
    assert not plan.refusals
    assert {item.name: item.value for item in plan.items}["completions"] == "800"


async def test_two_reports_are_compared_by_problem(rig: Rig) -> None:
    """R-093: but not if another judge made one of them."""
    before = (await rig.evaluator.end(await rig.evaluator.start())).result_digest
    await rig.evaluator.put_bundle()
    rig.inference.reply = lambda prompt, seed: "    return object()\n" if "_even" in prompt else answer(prompt, seed)
    after = (await rig.evaluator.end(await rig.evaluator.start())).result_digest
    reply = await rig.evaluator.ask("Compare", baseline=before, candidate=after)
    assert len(reply.lost) >= 6
    assert not reply.gained
    assert reply.difference == pytest.approx(-len(reply.lost) / 200)
    assert reply.verdict == "worse"
    same = await rig.evaluator.ask("Compare", baseline=before, candidate=before)
    assert (same.verdict, same.p_value) == ("no difference shown", 1.0)
    rig.sandbox.judge_digest = digest_bytes(b"another judge")
    judged_otherwise = (await rig.evaluator.end(await rig.evaluator.start())).result_digest
    with pytest.raises(ReportMismatch, match="made with another judge"):
        await rig.evaluator.ask("Compare", baseline=before, candidate=judged_otherwise)
    part = (await rig.evaluator.end(await rig.evaluator.start(limit=20))).result_digest
    with pytest.raises(ReportMismatch, match="200 problems, the other 20"):
        await rig.evaluator.ask("Compare", baseline=before, candidate=part)


async def test_a_gate_that_is_not_met_says_why_and_is_announced(rig: Rig) -> None:
    """R-009, R-095."""
    report = (await rig.evaluator.report(await rig.evaluator.start())).report
    heard: list[event_pb2.GateFailed] = []

    async def hear(message: Msg) -> None:
        heard.append(event_pb2.GateFailed.FromString(message.data))

    clauses = ["basic pass@1 >= 0.7", "humaneval pass@1 >= 0.1"]
    missing = digest_bytes(b"no report")
    async with rig.evaluator.bus.listen("smelt.evt.evaluator.gate.failed.default", hear):
        fields = {"bundle_digest": report.bundle_digest, "reports": [report.digest, missing], "clauses": clauses}
        reply = await rig.evaluator.ask("CheckGate", **fields)
        event = await eventually(lambda: heard[0] if heard else None)
    assert not reply.is_met
    assert [clause.is_met for clause in reply.clauses] == [True, False]
    assert (event.gate, event.measured) == (clauses[1], "no report of humaneval")
    assert (await rig.evaluator.ask("CheckGate", **{**fields, "clauses": clauses[:1]})).is_met
    fields["bundle_digest"] = digest_bytes(b"another bundle")
    assert not (await rig.evaluator.ask("CheckGate", **{**fields, "clauses": clauses[:1]})).is_met


async def test_stored_completions_are_judged_like_a_models(rig: Rig) -> None:
    lines = [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in ROWS[:120]]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    spec = {"suite": "basic", "completions_digest": rig.evaluator.store.put_bytes(data)}
    job = (await rig.evaluator.ask("StartJudgement", spec=spec, request_id=uuid4().hex)).job
    report = (await rig.evaluator.report(job)).report
    assert (report.scores[0].passed, report.scores[0].problems, report.bundle_digest) == (120, 200, "")
    assert not rig.inference.asked
    reply = await rig.evaluator.ask(
        "CheckGate",
        bundle_digest=digest_bytes(b"bundle"),
        reports=[report.digest],
        clauses=["basic pass@1 >= 0.1"],
    )
    assert not reply.is_met


async def test_a_perplexity_is_a_report_with_window_and_stride(rig: Rig) -> None:
    """R-097: and the same measurement again is the stored one (R-096)."""
    rig.evaluator.store.put_bytes((DATA_DIR / "wiki.test.raw").read_bytes())
    job = await rig.evaluator.start(suite="wikitext2")
    report = (await rig.evaluator.report(job)).report
    token, byte = report.scores
    assert (token.metric, byte.metric) == ("token_perplexity", "byte_perplexity")
    assert token.value == pytest.approx(math.exp(3), rel=1e-5)
    known = json.loads(report.provenance_json)
    assert (known["text"]["window_tokens"], known["text"]["stride_tokens"]) == (1024, 512)
    assert known["text"]["tokens"] >= 100_000
    assert rig.inference.scored == token.problems
    assert (await rig.evaluator.start(suite="wikitext2")).is_cached
    with pytest.raises(ReportMismatch, match="no problems to pair"):
        await rig.evaluator.ask("Compare", baseline=report.digest, candidate=report.digest)
    with pytest.raises(UnsupportedOption, match="limit has no effect"):
        await rig.evaluator.start(suite="wikitext2", limit=5)


async def test_a_perplexity_of_guessing_fails_the_job(rig: Rig) -> None:
    """R-097: more than half the vocabulary is no score, and nothing is stored."""
    rig.evaluator.store.put_bytes((DATA_DIR / "wiki.test.raw").read_bytes())
    rig.inference.logprob = -math.log(5000)
    job = await rig.evaluator.end(await rig.evaluator.start(suite="wikitext2"))
    assert (job.error.reason, job.result_digest) == ("ABSURD_PERPLEXITY", "")


async def test_an_evaluator_killed_in_the_middle_goes_on_after_its_restart(rig: Rig) -> None:
    """The same job ends with the same score; what was stored is not generated again."""
    rig.inference.delay_s = 0.2
    job = await rig.evaluator.start()
    await rig.evaluator.until(job, lambda seen: seen.progress.phase == "generate" and seen.progress.done >= 100)
    rig.process.kill()
    rig.inference.delay_s = 0
    rig.process.start()
    report = (await rig.evaluator.report(job)).report
    assert (report.scores[0].passed, report.scores[0].problems) == (150, 200)
    assert json.loads(report.provenance_json)["provenance"]["resumed_samples"] >= 64
    assert len(rig.inference.asked) == 200
    assert sum(rig.inference.asked.values()) <= 200 + 64


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Mapping[str, NatsServer | S3Server]]]:
    """An evaluator on servers of its own, which may be killed."""
    with (
        nats_server() as nats,
        s3_server() as s3,
        site(nats, s3, tmp_path_factory.mktemp("doomed")) as place,
    ):
        yield place, {"nats": nats, "s3": s3}


@pytest.mark.parametrize("victim", ["nats", "s3"])
async def test_a_platform_server_killed_in_the_middle_costs_nothing(
    victim: str, doomed: tuple[Site, Mapping[str, NatsServer | S3Server]], tmp_path: Path
) -> None:
    """NATS or S3 is killed during generation and comes back: same job, same score, every problem once."""
    place, servers = doomed
    async with rig_at(place, tmp_path) as rig:
        rig.inference.delay_s = 0.1
        job = await rig.evaluator.start()
        await rig.evaluator.until(job, lambda seen: seen.progress.phase == "generate" and seen.progress.done >= 60)
        servers[victim].kill()
        servers[victim].start()
        reply = await rig.evaluator.report(job, with_samples=True)
        assert (reply.report.scores[0].passed, reply.report.scores[0].problems) == (150, 200)
        assert len({sample.problem for sample in reply.samples}) == 200
