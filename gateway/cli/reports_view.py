"""Suites, reports, comparisons and gates as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2

from gateway.cli.output import facts, human_time, short_digest, table


def suites_view(suites: Iterable[evaluator_pb2.Suite]) -> RenderableType:
    """A line a suite."""
    rows = ((suite.name, suite.problems, suite.data_file, suite.licence, suite.description) for suite in suites)
    return table(("suite", ">problems", "data", "licence", ""), rows)


def scores_view(scores: Iterable[evaluator_pb2.Score]) -> RenderableType:
    """Each score with its interval and what it was measured on."""
    rows = (
        (
            score.suite,
            score.metric,
            f"{100 * score.value:.1f} %",
            f"{100 * score.low:.1f} - {100 * score.high:.1f} %",
            f"{score.passed}/{score.problems}" + (" (partial)" if score.is_partial else ""),
            score.samples,
        )
        for score in scores
    )
    return table(("suite", "metric", ">value", ">95 % interval", ">passed", ">samples"), rows)


def report_view(report: evaluator_pb2.Report) -> list[RenderableType]:
    """A report without its samples."""
    verdicts = "  ".join(f"{name} {count}" for name, count in sorted(report.verdicts.items()))
    speed = report.completion_tokens / report.generate_s if report.generate_s else 0.0
    known = facts(
        [
            ("verdicts", verdicts),
            ("generation", f"{report.completion_tokens} tokens, {speed:.0f} tokens/s" if speed else ""),
            ("took", human_time(report.total_s)),
            ("batching", _batching(report)),
            ("model", report.bundle_digest),
            ("report", report.digest),
        ]
    )
    return [scores_view(report.scores), known]


def _batching(report: evaluator_pb2.Report) -> str:
    """R-040 for people: whether the company of other completions could change a token."""
    provenance = json.loads(report.provenance_json or "{}").get("provenance", {})
    if not provenance.get("is_batch_variant"):
        return ""
    return f"batch-variant: up to {provenance['concurrency']} completions at once; --concurrency 1 is not"


def judgement_document(reply: evaluator_pb2.GetReportResponse) -> dict[str, Any]:
    """Judged completions for machines: the score, and one entry a sample in the order of the suite."""
    score = reply.report.scores[0] if reply.report.scores else evaluator_pb2.Score()
    return {
        "suite": score.suite,
        "total": score.problems,
        "passed": score.passed,
        "pass_at_1": score.value,
        "interval": [score.low, score.high],
        "problems": [
            {
                "task_id": sample.problem,
                "sample": sample.sample,
                "passed": sample.verdict == "passed",
                "verdict": sample.verdict,
                "detail": sample.detail,
            }
            for sample in reply.samples
        ],
        "report": reply.report.digest,
    }


def samples_view(samples: Iterable[evaluator_pb2.SampleRecord]) -> RenderableType:
    """A line a sample; the programs are in the JSON document."""
    rows = (
        (sample.problem, sample.sample, sample.verdict, sample.finish_reason, sample.completion_tokens, sample.detail)
        for sample in samples
    )
    return table(("problem", ">sample", "verdict", "ended by", ">tokens", "detail"), rows)


def results_view(reports: Iterable[tuple[str, evaluator_pb2.Report]]) -> RenderableType:
    """A line a finished evaluation: its job and its first score."""
    rows = []
    for job_id, report in reports:
        score = report.scores[0] if report.scores else evaluator_pb2.Score()
        interval = f"{100 * score.low:.1f} - {100 * score.high:.1f} %"
        value = f"{100 * score.value:.1f} %" + (" (partial)" if score.is_partial else "")
        rows.append(
            (
                score.suite,
                score.metric,
                value,
                interval,
                short_digest(report.bundle_digest),
                short_digest(report.digest),
                job_id,
            )
        )
    return table(("suite", "metric", ">value", ">95 % interval", "model", "report", "job"), rows)


def compare_view(reply: evaluator_pb2.CompareResponse) -> list[RenderableType]:
    """The verdict first, then what it rests on."""
    return [
        facts(
            [
                ("verdict", reply.verdict),
                ("difference", f"{100 * reply.difference:+.1f} points"),
                ("95 % interval (score)", f"{100 * reply.low:+.1f} to {100 * reply.high:+.1f} points"),
                ("p-value (exact, decides)", f"{reply.p_value:.4f}"),
                ("gained", f"{len(reply.gained)}: {', '.join(reply.gained)}" if reply.gained else "0"),
                ("lost", f"{len(reply.lost)}: {', '.join(reply.lost)}" if reply.lost else "0"),
            ]
        )
    ]


def gate_view(reply: evaluator_pb2.CheckGateResponse) -> RenderableType:
    """A line a clause."""
    rows = ((clause.clause, "met" if clause.is_met else "NOT MET", clause.measured) for clause in reply.clauses)
    return table(("clause", "", "measured"), rows)


def record_view(record: artifact_pb2.Artifact) -> RenderableType:
    """What the reference solutions gave."""
    config: dict[str, Any] = json.loads(record.config_json or "{}")
    plain = ((key, value) for key, value in sorted(config.items()) if not isinstance(value, list | dict))
    return facts([("record", record.digest), *plain])
