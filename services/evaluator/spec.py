"""Requests to domain values, and the keys under which results are found again."""

from __future__ import annotations

from smelt.evaluator.v1 import evaluator_pb2

from services.evaluator.bundles import BundleFacts
from services.evaluator.data import check_digest
from services.evaluator.ports import JudgeInfo
from services.evaluator.settings import Settings
from services.evaluator.suites import Suite
from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.jobs.stages import StageCache


def settings_of(spec: evaluator_pb2.EvaluationSpec, suite: Suite, facts: BundleFacts | None = None) -> Settings:
    """The settings of a request for the bundle of `facts`, checked; they are in range for all bundles or for none."""
    check_digest(suite, spec.data_digest)
    return Settings.checked(
        suite,
        samples=spec.samples,
        temperature=spec.temperature,
        top_p=spec.top_p,
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        limit=spec.limit,
        has_thinking=facts is not None and facts.has_thinking,
    )


def concurrency_of(spec: evaluator_pb2.EvaluationSpec, default: int) -> int:
    """Requests in flight at once: the request's number, or the service's own; BadRequest names the range."""
    if not 0 <= spec.concurrency <= limits.EVALUATION_CONCURRENCY_MAX:
        raise BadRequest(f"concurrency={spec.concurrency} must be 0 to {limits.EVALUATION_CONCURRENCY_MAX}")
    return spec.concurrency or default


def is_batch_variant(concurrency: int) -> bool:
    """Whether what shares a step may change the last bits of a logit, and so a token where two are almost tied."""
    return concurrency > 1


def evaluation_key(
    stages: StageCache,
    bundle: str,
    suite: Suite,
    settings: Settings,
    engine_digest: str,
    judge: JudgeInfo,
    *,
    concurrency: int,
) -> str:
    """The key of an evaluation: all that its samples depend on. Of concurrency only whether there is any."""
    parameters = {
        "suite": suite.digest,
        "settings": settings.to_dict(),
        "engine": engine_digest,
        "judge": judge.digest,
        "profile": judge.profile(suite.profile),
        "is_batch_variant": is_batch_variant(concurrency),
    }
    return stages.key("evaluate", parameters, [bundle, suite.data.digest])


def references_key(stages: StageCache, suite: Suite, judge: JudgeInfo) -> str:
    """The key of a suite's references under one judge on one kind of CPU: their times become limits of candidates."""
    parameters = {
        "suite": suite.digest,
        "judge": judge.digest,
        "profile": judge.profile(suite.profile),
        "level": judge.level,
        "cpu": judge.cpu,
    }
    return stages.key("references", parameters, [suite.data.digest])
