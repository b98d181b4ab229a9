"""Commands that score and compare, against a scripted gateway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripted_gateway import DIGEST, gateway, job, watched
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.job.v1 import job_pb2

from smeltkit.ids import digest_bytes

DATA = b'{"task_id": "t/0"}\n'
REPORT = evaluator_pb2.Report(
    digest=DIGEST,
    bundle_digest=DIGEST,
    scores=[evaluator_pb2.Score(suite="basic", metric="pass@1", value=0.75, low=0.5, high=0.9, passed=3, problems=4)],
    verdicts={"passed": 3, "wrong": 1},
    provenance_json='{"seed":0}',
    completion_tokens=100,
    generate_s=2.0,
)


def _answers() -> dict[str, Any]:
    suite = evaluator_pb2.Suite(name="basic", problems=4, data_file="basic.jsonl", data_digest=digest_bytes(DATA))
    suite.data_url = "repository:examples/data/basic.jsonl"
    started = job("QUEUED", service="evaluator", kind="evaluate")
    return {
        "EvaluatorService.ListSuites": lambda request: evaluator_pb2.ListSuitesResponse(suites=[suite]),
        "EvaluatorService.StartEvaluation": lambda request: evaluator_pb2.StartEvaluationResponse(job=started),
        "EvaluatorService.GetReport": lambda request: evaluator_pb2.GetReportResponse(
            report=REPORT,
            samples=[evaluator_pb2.SampleRecord(problem="t/0", verdict="passed")] if request.with_samples else [],
        ),
        "JobService.WatchJob": watched(job("SUCCEEDED", result_digest=DIGEST)),
        "ArtifactService.BeginUpload": lambda request: artifact_pb2.BeginUploadResponse(is_stored=True),
    }


async def test_evaluation_shows_score_and_interval(tmp_path: Path) -> None:
    """The data is found in its folder, proven, stored, and named by digest. R-092"""
    (tmp_path / "basic.jsonl").write_bytes(DATA)
    async with gateway(_answers()) as running:
        ended = await running.smelt("eval", "--suite", "basic", "--data", str(tmp_path), "--limit", "4", "ore")
        (request,) = running.requests["EvaluatorService.StartEvaluation"]
    assert ended.code == 0, ended.err
    for text in ("75.0 %", "50.0 - 90.0 %", "3/4", "wrong 1", "50 tokens/s"):
        assert text in ended.out
    assert (request.spec.bundle, request.spec.data_digest, request.spec.limit) == ("ore", digest_bytes(DATA), 4)


async def test_judged_completions_are_one_document_with_an_entry_a_sample(tmp_path: Path) -> None:
    """The file is stored, judged by digest, and each sample told with its verdict."""
    (tmp_path / "c.jsonl").write_text('{"task_id": "t/0", "completion": "pass"}\n')
    started = job("QUEUED", service="evaluator", kind="judge")
    answers = _answers() | {
        "EvaluatorService.StartJudgement": lambda request: evaluator_pb2.StartJudgementResponse(job=started)
    }
    async with gateway(answers) as running:
        file = str(tmp_path / "c.jsonl")
        ended = await running.smelt("judge", "--suite", "basic", "--completions", file, "--json")
        (request,) = running.requests["EvaluatorService.StartJudgement"]
    document = json.loads(ended.out)
    assert request.spec.completions_digest == digest_bytes((tmp_path / "c.jsonl").read_bytes())
    assert (document["suite"], document["total"], document["passed"], document["pass_at_1"]) == ("basic", 4, 3, 0.75)
    assert document["interval"] == [0.5, 0.9]
    assert document["problems"] == [{"task_id": "t/0", "sample": 0, "passed": True, "verdict": "passed", "detail": ""}]


async def test_data_with_another_digest_is_refused(tmp_path: Path) -> None:
    """Nothing is stored and nothing started."""
    (tmp_path / "basic.jsonl").write_bytes(DATA + b"\n")
    async with gateway(_answers()) as running:
        ended = await running.smelt("eval", "--suite", "basic", "--data", str(tmp_path / "basic.jsonl"), "ore")
        assert set(running.requests) == {"EvaluatorService.ListSuites"}
    assert ended.code == 2
    assert "BAD_SUITE" in ended.err and "take examples/data/basic.jsonl of this repository" in ended.err


async def test_absent_data_is_named(tmp_path: Path) -> None:
    """The message says which file the folder lacks."""
    async with gateway(_answers()) as running:
        ended = await running.smelt("eval", "--suite", "basic", "--data", str(tmp_path), "ore")
    assert ended.code == 3
    assert "basic.jsonl" in ended.err


async def test_report_is_one_stable_document() -> None:
    """Scores, verdict counts and provenance, and the samples when asked for."""
    async with gateway(_answers()) as running:
        ended = await running.smelt("report", DIGEST, "--samples", "--json")
    document = json.loads(ended.out)
    assert document["verdicts"] == {"passed": 3, "wrong": 1}
    assert document["provenance"] == {"seed": 0}
    assert document["scores"][0]["value"] == 0.75
    assert document["samples"][0]["problem"] == "t/0"


async def test_comparison_names_what_was_gained_and_lost() -> None:
    """A job stands for the report it made."""
    reply = evaluator_pb2.CompareResponse(
        difference=0.1, low=-0.05, high=0.2, p_value=0.18, gained=["t/1"], verdict="no difference shown"
    )
    answers = {
        "EvaluatorService.Compare": lambda request: reply,
        "JobService.GetJob": lambda request: job_pb2.GetJobResponse(job=job("SUCCEEDED", result_digest=DIGEST)),
    }
    async with gateway(answers) as running:
        ended = await running.smelt("compare", DIGEST, "job-1")
        (request,) = running.requests["EvaluatorService.Compare"]
    assert (request.baseline, request.candidate) == (DIGEST, DIGEST)
    assert "no difference shown" in ended.out and "t/1" in ended.out and "+10.0 points" in ended.out


async def test_word_that_is_no_report_says_what_a_report_is_called_by() -> None:
    """Nothing is asked of the gateway."""
    async with gateway({}) as running:
        ended = await running.smelt("compare", "nope", DIGEST)
        assert not running.requests
    assert ended.code == 3 and "`smelt results` lists them" in ended.err


async def test_unmet_gate_ends_with_1() -> None:
    """A clause without a measurement counts as not met. R-009"""
    clauses = [evaluator_pb2.ClauseResult(clause="mbpp pass@1 >= 0.5", measured="no report of mbpp")]
    artifact = artifact_pb2.Artifact(digest=DIGEST)
    answers = {
        "ArtifactService.GetArtifact": lambda request: artifact_pb2.GetArtifactResponse(artifact=artifact),
        "EvaluatorService.CheckGate": lambda request: evaluator_pb2.CheckGateResponse(clauses=clauses),
    }
    async with gateway(answers) as running:
        ended = await running.smelt("gate", "ore", "--report", DIGEST, "--clause", "mbpp pass@1 >= 0.5")
    assert ended.code == 1
    assert ended.out.count("NOT MET") == 1 and "no report of mbpp" in ended.out
