"""R-122: what is shown is what is stored, digit for digit where a machine reads, and nothing that is absent is a 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import RenderableType
from scripted_gateway import DIGEST, gateway, job
from smelt.evaluator.v1 import evaluator_pb2
from smelt.sandbox.v1 import sandbox_pb2

from gateway.cli.jobs_view import jobs_view
from gateway.cli.output import Output
from gateway.cli.reports_view import (
    judgement_document,
    report_document,
    report_view,
    results_view,
    sample_document,
    samples_view,
    scores_view,
    suite_document,
    suites_view,
)
from gateway.cli.sandbox_view import outcome_view

SCORE = evaluator_pb2.Score(
    suite="basic", metric="pass@1", value=137 / 200, low=0.6176321, high=0.7456789, passed=137, problems=200, samples=1
)
PERPLEXITY = evaluator_pb2.Score(
    suite="text", metric="token_perplexity", value=7.123456789, low=7.0, high=7.25, problems=48, samples=1
)
REPORT = evaluator_pb2.Report(
    digest=DIGEST, bundle_digest=DIGEST, scores=[SCORE], completion_tokens=5800, generate_s=32.25, total_s=61.5
)
JUDGEMENT = evaluator_pb2.Report(digest=DIGEST, scores=[SCORE], total_s=3.5)
SAMPLE = evaluator_pb2.SampleRecord(problem="basic/0", verdict="passed", finish_reason="stop", completion_tokens=29)


def shown(capsys: pytest.CaptureFixture[str], *views: RenderableType) -> str:
    """What a person sees, with single spaces."""
    Output().show({}, *views)
    return " ".join(capsys.readouterr().out.split())


def test_document_of_a_report_has_the_stored_numbers_to_the_last_digit() -> None:
    """No rounding on the way to a machine."""
    document = json.loads(json.dumps(report_document(REPORT)))
    stored = {field.name: value for field, value in SCORE.ListFields()}
    assert {name: document["scores"][0][name] for name in stored} == stored
    assert (document["completion_tokens"], document["generate_s"], document["total_s"]) == (5800, 32.25, 61.5)


def test_table_of_a_report_shows_the_stored_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounded for people, and computed from nothing else."""
    text = shown(capsys, *report_view(REPORT))
    for part in ("68.5 %", "61.8 - 74.6 %", "137/200", "5800 tokens, 180 tokens/s", "61.5 s"):
        assert part in text
    listed = shown(capsys, results_view([("job-1", REPORT)]))
    assert "68.5 %" in listed and "61.8 - 74.6 %" in listed


def test_perplexity_is_a_plain_number_without_a_count_of_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """It is no share of problems."""
    text = shown(capsys, scores_view([PERPLEXITY]))
    assert "7.1235" in text and "7.0000 - 7.2500" in text and "-/48" in text and "%" not in text.split("samples")[1]
    (score,) = report_document(evaluator_pb2.Report(digest=DIGEST, bundle_digest=DIGEST, scores=[PERPLEXITY]))["scores"]
    assert (score["value"], score["passed"]) == (7.123456789, None)


def test_perplexity_states_its_windows_and_no_generation(capsys: pytest.CaptureFixture[str]) -> None:
    """R-097, R-122: nothing was generated, so no tokens are counted, not 0 of them."""
    known = '{"text": {"tokens": 462799, "bytes": 1290547, "window_tokens": 1024, "stride_tokens": 512}}'
    report = evaluator_pb2.Report(digest=DIGEST, bundle_digest=DIGEST, scores=[PERPLEXITY], provenance_json=known)
    text = shown(capsys, *report_view(report))
    assert "462,799 tokens in windows of 1024, stride 512" in text and "generation -" in text
    document = report_document(report)
    assert (document["completion_tokens"], document["bundle_digest"]) == (None, DIGEST)


def test_completions_made_elsewhere_have_no_tokens_no_speed_and_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody counted them: a dash and null, not 0."""
    document = report_document(JUDGEMENT)
    assert [document[name] for name in ("bundle_digest", "completion_tokens", "generate_s")] == [None] * 3
    assert sample_document(JUDGEMENT, evaluator_pb2.SampleRecord(problem="x"))["completion_tokens"] is None
    text = shown(capsys, *report_view(JUDGEMENT))
    assert "generation -" in text and "model -" in text and "0 tokens" not in text
    reply = evaluator_pb2.GetReportResponse(report=JUDGEMENT, samples=[evaluator_pb2.SampleRecord(problem="x")])
    assert shown(capsys, samples_view(reply)).split("detail")[1].split() == ["x", "0", "-"]
    made = evaluator_pb2.GetReportResponse(report=REPORT, samples=[SAMPLE])
    assert shown(capsys, samples_view(made)).split("detail")[1].split() == ["basic/0", "0", "passed", "stop", "29"]


def test_text_has_no_count_of_problems(capsys: pytest.CaptureFixture[str]) -> None:
    """Its perplexity is measured; a suite of problems shows how many."""
    suites = [evaluator_pb2.Suite(name="text"), evaluator_pb2.Suite(name="basic", problems=200)]
    assert [suite_document(suite)["problems"] for suite in suites] == [None, 200]
    assert shown(capsys, suites_view(suites)).split("licence")[1].split() == ["text", "-", "basic", "200"]


def test_report_without_a_score_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A score that was withheld is not 0 %."""
    withheld = evaluator_pb2.Report(digest=DIGEST, bundle_digest=DIGEST)
    text = shown(capsys, results_view([("job-1", withheld)]))
    assert text.split("job ")[1].split()[:4] == ["-"] * 4 and "0.0 %" not in text
    document = judgement_document(evaluator_pb2.GetReportResponse(report=withheld))
    assert [document[name] for name in ("suite", "total", "passed", "pass_at_1", "interval")] == [None] * 5


@pytest.mark.parametrize(("peak_bytes", "table", "value"), [(0, "peak memory -", None), (3 << 20, "3.0 MiB", 3 << 20)])
async def test_memory_that_could_not_be_measured_is_no_zero(
    capsys: pytest.CaptureFixture[str], peak_bytes: int, table: str, value: Any
) -> None:
    """Not every host can measure it."""
    record = sandbox_pb2.Record(verdict="VERDICT_PASSED", wall_s=0.5, cpu_s=0.25, peak_bytes=peak_bytes)
    reply = sandbox_pb2.ExecuteResponse(record=record)
    assert table in shown(capsys, *outcome_view(reply))
    async with gateway({"SandboxService.Execute": lambda request: reply}) as running:
        ended = await running.smelt("sandbox", "run", "-", "--json", stdin="pass")
    assert json.loads(ended.out)["peak_bytes"] == value


def test_job_that_has_not_begun_has_taken_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A dash; one that ended shows the difference of its stored times."""
    begun, ended = Timestamp(seconds=100), Timestamp(seconds=107, nanos=500_000_000)
    queued = job("QUEUED", create_time=begun, update_time=begun)
    done = job("SUCCEEDED", create_time=begun, update_time=ended)
    lines = [shown(capsys, jobs_view([one])) for one in (queued, done)]
    assert lines[0].endswith("-") and "0.0 ms" not in lines[0]
    assert lines[1].endswith("7.5 s")
