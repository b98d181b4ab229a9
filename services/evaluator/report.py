"""The report of an evaluation: an artifact about a bundle, with every digest and setting that its scores rest on.

Scores are computed here and nowhere else, from records of samples; `open_report` computes them again from the stored
records and refuses a report that says otherwise. References have another artifact type and no way in (R-087).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from services.evaluator.records import INFRA, Sample, from_lines, to_lines
from services.evaluator.settings import Settings
from services.evaluator.stats import mean_estimate, pass_at_k
from services.evaluator.suites import Suite, suites
from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import ReportMismatch, SamplesNotDistinct, ScoreWithheld
from smeltkit.manifest import JUDGEMENT_TYPE, REPORT_TYPE, Descriptor, Manifest

RECORDS_FILE = "samples.jsonl"
RECORDS_TYPE = "application/x-ndjson"
LENGTH = "length"
_KS = (1, 10, 100)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one suite with its 95 % interval."""

    suite: str
    metric: str
    value: float
    low: float
    high: float
    passed: int
    """Problems with at least one sample that passed."""
    problems: int
    samples: int
    """Samples a problem."""
    is_partial: bool
    """Whether fewer problems than the split's were run."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A stored report, verified against its records."""

    digest: str
    bundle: str
    """Digest of the bundle; empty for a judgement."""
    suite: str
    suite_digest: str
    data_digest: str
    has_current_suite: bool
    """Whether this release has the suite exactly as the report used it."""
    scores: tuple[Score, ...]
    config: Mapping[str, Any]
    samples: tuple[Sample, ...]

    def score(self, metric: str) -> Score | None:
        """The score of `metric`, None if the report has none."""
        return next((score for score in self.scores if score.metric == metric), None)

    def rates(self) -> dict[str, Fraction]:
        """The share of samples that passed, by problem."""
        return {name: Fraction(passed, count) for name, (passed, count) in _counts(self.samples).items()}


def compute_scores(suite: str, split_problems: int, samples: Sequence[Sample]) -> tuple[Score, ...]:
    """pass@1, and pass@10 and pass@100 where there are as many samples a problem.

    ScoreWithheld if an infrastructure error is among the verdicts (R-088); ReportMismatch if problems have different
    numbers of samples, or there is none.
    """
    infra = [sample for sample in samples if sample.verdict == INFRA]
    if infra:
        raise ScoreWithheld(
            f"{len(infra)} of {len(samples)} verdicts are infrastructure errors; judge them again first"
        )
    counts = _counts(samples)
    sizes = {count for _, count in counts.values()}
    if len(sizes) != 1:
        raise ReportMismatch(f"{len(counts)} problems with {sorted(sizes)} samples each give no score")
    size = sizes.pop()
    scores = []
    for k in (k for k in _KS if k <= size):
        estimate = mean_estimate([pass_at_k(size, passed, k) for passed, _ in counts.values()])
        scores.append(
            Score(
                suite=suite,
                metric=f"pass@{k}",
                value=estimate.value,
                low=estimate.low,
                high=estimate.high,
                passed=sum(passed > 0 for passed, _ in counts.values()),
                problems=len(counts),
                samples=size,
                is_partial=len(counts) < split_problems,
            )
        )
    return tuple(scores)


def distinct_share(samples: Sequence[Sample]) -> float | None:
    """The share of further samples of a problem that differ from those before; None with one sample a problem."""
    replies: dict[str, list[str]] = {}
    for sample in samples:
        replies.setdefault(sample.problem, []).append(sample.reply)
    further = sum(len(texts) - 1 for texts in replies.values())
    return sum(len(set(texts)) - 1 for texts in replies.values()) / further if further else None


def check_distinct(samples: Sequence[Sample]) -> float | None:
    """`distinct_share`, or SamplesNotDistinct if it is below the stated rate (R-099): seeds then had no effect."""
    share = distinct_share(samples)
    if share is not None and share < limits.EVALUATION_DISTINCT_MIN and len(samples) >= limits.EVALUATION_DISTINCT_FROM:
        raise SamplesNotDistinct(
            f"{share:.1%} of further samples differ, at least {limits.EVALUATION_DISTINCT_MIN:.0%} must; raise the"
            " temperature, or see that the engine uses the seeds"
        )
    return share


def store_report(
    store: Store,
    suite: Suite,
    settings: Settings,
    samples: Sequence[Sample],
    *,
    used: Mapping[str, Any],
    provenance: Mapping[str, Any],
    times: Mapping[str, Any],
) -> str:
    """Computes the scores, stores records and report; its digest.

    `provenance` names suite, data and `bundle`; where the bundle is empty it is a judgement of stored completions.
    """
    scores = compute_scores(suite.name, suite.problems, samples)
    lines = to_lines(samples)
    layer = Descriptor(media_type=RECORDS_TYPE, digest=store.put_bytes(lines), size_bytes=len(lines), path=RECORDS_FILE)
    config = {
        "suite": {"name": suite.name, "version": suite.version, "split": suite.split, "problems": suite.problems},
        "scores": [asdict(score) for score in scores],
        "verdicts": _tally(sample.verdict for sample in samples),
        "finish_reasons": _tally(sample.finish_reason for sample in samples),
        "length_ended": sum(sample.finish_reason == LENGTH for sample in samples),
        "joins": _tally(sample.join for sample in samples),
        "infra": sum(sample.verdict == INFRA for sample in samples),
        "shortened_limits": sum(sample.max_tokens < settings.max_tokens for sample in samples),
        "distinct_share": check_distinct(samples) if settings.temperature else distinct_share(samples),
        "prompt_tokens": sum(sample.prompt_tokens for sample in samples),
        "completion_tokens": sum(sample.completion_tokens for sample in samples),
        "settings": {"requested": settings.to_dict(), "effective": dict(used)},
        "provenance": {**provenance, "records": layer.digest},
        "times": dict(times),
    }
    bundle = provenance["bundle"]
    kind = REPORT_TYPE if bundle else JUDGEMENT_TYPE
    manifest = Manifest(artifact_type=kind, config=config, layers=(layer,), subject=bundle)
    return store.put_manifest(manifest)


def open_report(store: Store, digest: str) -> Report:
    """The stored report or judgement, its scores computed again from its records.

    UnknownArtifact; BadManifest if it is no report; ReportMismatch if its scores are not those of its records.
    """
    manifest = store.get_manifest(digest)
    manifest.expect(REPORT_TYPE, JUDGEMENT_TYPE, remedy="scores come from reports only")
    layer = manifest.layer(RECORDS_FILE)
    if layer is None:
        raise ReportMismatch(f"report {digest} has no records, so its scores rest on nothing")
    config = manifest.config
    samples = tuple(from_lines(store.get_bytes(layer.digest)))
    try:
        suite, provenance = config["suite"], config["provenance"]
        scores = compute_scores(suite["name"], suite["problems"], samples)
        if [asdict(score) for score in scores] != config["scores"] or provenance["bundle"] != manifest.subject:
            raise ReportMismatch(f"report {digest} says other scores than its records give")
        return Report(
            digest=digest,
            bundle=manifest.subject,
            suite=suite["name"],
            suite_digest=provenance["suite"],
            has_current_suite=_is_current(suite, provenance["suite"]),
            data_digest=provenance["data"],
            scores=scores,
            config=config,
            samples=samples,
        )
    except (KeyError, TypeError) as error:
        raise ReportMismatch(f"report {digest} is malformed: {error!r}") from error


def check_same_harness(one: Report, other: Report) -> None:
    """Raises ReportMismatch unless prompts, judge and way of sampling of both were the same (R-093)."""
    mine, theirs = _harness(one), _harness(other)
    differ = [name for name in mine if mine[name] != theirs[name]]
    if differ:
        name = differ[0]
        raise ReportMismatch(
            f"the reports were made with another {name}: {mine[name]} and {theirs[name]}; a difference between them"
            " would not be one of the models, so run both evaluations the same way"
        )


def _harness(report: Report) -> dict[str, Any]:
    """What measured a report beside suite and data. Room for reasoning belongs to the model, a seed to chance."""
    provenance, sampling = report.config["provenance"], report.config["settings"]["requested"]
    named = {name: provenance.get(name, {}).get("digest", "none") for name in ("prompt", "judge")}
    return {**named, "temperature": sampling["temperature"], "top_p": sampling["top_p"]}


def _is_current(suite: Mapping[str, Any], digest: str) -> bool:
    known = suites().get(suite["name"])
    return known is not None and (known.digest, known.problems) == (digest, suite["problems"])


def _counts(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Samples that passed and samples in all, by problem in order of first appearance."""
    counts: dict[str, tuple[int, int]] = {}
    for sample in samples:
        passed, count = counts.get(sample.problem, (0, 0))
        counts[sample.problem] = passed + sample.has_passed, count + 1
    return counts


def _tally(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
