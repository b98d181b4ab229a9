"""Suites, reports, comparisons and gates, as documents and as tables.

What was not measured is None in a document and a dash in a table, never 0: messages cannot tell the two apart, so here
stands which values a report does not have (R-122).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2

from gateway.cli.documents import to_document
from gateway.cli.output import facts, human_time, measured, short_digest, table


def suites_view(suites: Iterable[evaluator_pb2.Suite]) -> RenderableType:
    """A line a suite."""
    rows = ((suite.name, suite.problems or "-", suite.data_file, suite.licence, suite.description) for suite in suites)
    return table(("suite", ">problems", "data", "licence", ""), rows)


def suite_document(suite: evaluator_pb2.Suite) -> dict[str, Any]:
    """A suite for machines; a text, whose perplexity is measured, has no problems."""
    return to_document(suite) | {"problems": suite.problems or None}


def report_document(report: evaluator_pb2.Report) -> dict[str, Any]:
    """A report for machines."""
    document = to_document(report)
    if not _is_generated(report):
        document |= {"completion_tokens": None, "generate_s": None}
    if not report.bundle_digest:
        document["bundle_digest"] = None
    for score, entry in zip(report.scores, document["scores"], strict=True):
        entry |= {} if _is_share(score) else {"passed": None}
    return document


def sample_document(report: evaluator_pb2.Report, sample: evaluator_pb2.SampleRecord) -> dict[str, Any]:
    """A sample of `report` for machines."""
    return to_document(sample) | ({} if _is_generated(report) else {"completion_tokens": None})


def _is_generated(report: evaluator_pb2.Report) -> bool:
    """Whether a bundle generated what was judged; no perplexity and no completion made elsewhere has tokens or time."""
    return bool(report.bundle_digest) and not _text(report)


def _is_share(score: evaluator_pb2.Score) -> bool:
    """Whether the score is a share of problems; others, such as a perplexity, are plain numbers."""
    return score.metric.startswith("pass@")


def _value(score: evaluator_pb2.Score) -> tuple[str, str]:
    """The value and its interval."""
    if _is_share(score):
        return f"{100 * score.value:.1f} %", f"{100 * score.low:.1f} - {100 * score.high:.1f} %"
    return f"{score.value:.4f}", f"{score.low:.4f} - {score.high:.4f}"


def scores_view(scores: Iterable[evaluator_pb2.Score]) -> RenderableType:
    """Each score with its interval and what it was measured on."""
    rows = (
        (
            score.suite,
            score.metric,
            *_value(score),
            f"{score.passed if _is_share(score) else '-'}/{score.problems}"
            + (" (partial)" if score.is_partial else ""),
            score.samples,
        )
        for score in scores
    )
    return table(("suite", "metric", ">value", ">95 % interval", ">passed", ">samples"), rows)


def report_view(report: evaluator_pb2.Report) -> list[RenderableType]:
    """A report without its samples."""
    verdicts = "  ".join(f"{name} {count}" for name, count in sorted(report.verdicts.items()))
    speed = f", {report.completion_tokens / report.generate_s:.0f} tokens/s" if report.generate_s else ""
    known = facts(
        [
            ("verdicts", verdicts),
            ("generation", f"{report.completion_tokens} tokens{speed}" if _is_generated(report) else "-"),
            ("took", human_time(report.total_s)),
            ("text", _text(report)),
            ("batching", _batching(report)),
            ("model", measured(report.bundle_digest)),
            ("report", report.digest),
        ]
    )
    return [scores_view(report.scores), known]


def _text(report: evaluator_pb2.Report) -> str:
    """What a perplexity was measured on and how; empty for any other score (R-097)."""
    text = json.loads(report.provenance_json or "{}").get("text")
    if text is None:
        return ""
    return f"{text['tokens']:,} tokens in windows of {text['window_tokens']}, stride {text['stride_tokens']}"


def _batching(report: evaluator_pb2.Report) -> str:
    """R-040 for people: whether the company of other completions could change a token."""
    provenance = json.loads(report.provenance_json or "{}").get("provenance", {})
    if not provenance.get("is_batch_variant"):
        return ""
    return f"batch-variant: up to {provenance['concurrency']} completions at once; --concurrency 1 is not"


def judgement_document(reply: evaluator_pb2.GetReportResponse) -> dict[str, Any]:
    """Judged completions for machines: the score, and one entry a sample in the order of the suite."""
    score = reply.report.scores[0] if reply.report.scores else None
    return {
        "suite": score and score.suite,
        "total": score and score.problems,
        "passed": score and score.passed,
        "pass_at_1": score and score.value,
        "interval": score and [score.low, score.high],
        "without_completion": sum(sample.finish_reason == "none" for sample in reply.samples),
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


def samples_view(reply: evaluator_pb2.GetReportResponse) -> RenderableType:
    """A line a sample; the programs are in the JSON document."""
    has_tokens = _is_generated(reply.report)
    rows = (
        (
            sample.problem,
            sample.sample,
            sample.verdict,
            sample.finish_reason,
            sample.completion_tokens if has_tokens else "-",
            sample.detail,
        )
        for sample in reply.samples
    )
    return table(("problem", ">sample", "verdict", "ended by", ">tokens", "detail"), rows)


def results_view(reports: Iterable[tuple[str, evaluator_pb2.Report]]) -> RenderableType:
    """A line a finished evaluation: its job and its first score."""
    rows = []
    for job_id, report in reports:
        found = (measured(short_digest(report.bundle_digest)), short_digest(report.digest), job_id)
        for score in report.scores[:1]:
            value, interval = _value(score)
            shown = (score.suite, score.metric, value + (" (partial)" if score.is_partial else ""), interval)
            rows.append((*shown, *found))
        if not report.scores:
            rows.append(("-", "-", "-", "-", *found))
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
