"""Domain values as messages."""

from __future__ import annotations

from dataclasses import asdict

from smelt.evaluator.v1 import evaluator_pb2 as pb

from services.evaluator.gates import Decision
from services.evaluator.records import Sample
from services.evaluator.report import Report
from services.evaluator.suites import Suite
from services.evaluator.texts import Text
from services.evaluator.verbs import Comparison
from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.manifest import canonical_json


def to_suite(suite: Suite) -> pb.Suite:
    """A suite as a message."""
    return pb.Suite(
        name=suite.name,
        description=suite.description,
        problems=suite.problems,
        data_file=suite.data.file,
        data_digest=suite.data.digest,
        data_url=suite.data.url,
        licence=suite.data.licence,
        digest=suite.digest,
    )


def to_text(text: Text) -> pb.Suite:
    """A text whose perplexity is measured, as a suite without problems."""
    return pb.Suite(
        name=text.name,
        description=text.description,
        data_file=text.data.file,
        data_digest=text.data.digest,
        data_url=text.data.url,
        licence=text.data.licence,
        digest=text.digest,
    )


def to_report(report: Report) -> pb.Report:
    """A report as a message, without its samples."""
    config = dict(report.config)
    rest = {name: value for name, value in config.items() if name not in ("scores", "verdicts")}
    return pb.Report(
        digest=report.digest,
        bundle_digest=report.bundle,
        scores=[pb.Score(**asdict(score)) for score in report.scores],
        verdicts=config["verdicts"],
        provenance_json=canonical_json(rest).decode(),
        completion_tokens=config["completion_tokens"],
        generate_s=config["times"]["generate_s"],
        total_s=config["times"]["total_s"],
        trace_id=config["provenance"]["trace"],
    )


def to_samples(report: Report) -> list[pb.SampleRecord]:
    """Every sample of a report as a message; BadRequest if they are too many for one answer."""
    size_bytes = sum(len(sample.reply) + len(sample.program) + len(sample.detail) for sample in report.samples)
    if size_bytes > limits.MESSAGE_MAX_BYTES // 4:
        records = report.config["provenance"]["records"]
        raise BadRequest(f"the samples have {size_bytes} characters, too many for one answer; fetch the blob {records}")
    return [_to_sample(sample) for sample in report.samples]


def _to_sample(sample: Sample) -> pb.SampleRecord:
    return pb.SampleRecord(
        problem=sample.problem,
        sample=sample.sample,
        verdict=sample.verdict,
        detail=sample.detail,
        finish_reason=sample.finish_reason,
        completion_tokens=sample.completion_tokens,
        program=sample.program,
        reply=sample.reply,
    )


def to_comparison(comparison: Comparison) -> pb.CompareResponse:
    """A comparison as a message."""
    result = comparison.result
    return pb.CompareResponse(
        difference=result.difference.value,
        low=result.difference.low,
        high=result.difference.high,
        p_value=result.p_value,
        gained=comparison.gained,
        lost=comparison.lost,
        verdict=result.verdict,
    )


def to_gate(decisions: tuple[Decision, ...]) -> pb.CheckGateResponse:
    """A decided gate as a message; it is met if it has clauses and all of them are."""
    return pb.CheckGateResponse(
        is_met=bool(decisions) and all(decision.is_met for decision in decisions),
        clauses=[pb.ClauseResult(**asdict(decision)) for decision in decisions],
    )
