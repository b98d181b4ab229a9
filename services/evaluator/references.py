"""A suite's own solutions, judged before any model's: they prove the judge, and their CPU time sets the limits.

What comes of it is a reference record, an artifact of its own kind that holds no score (R-087).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.evaluator.ports import Attempt, Candidate, Judge, JudgeInfo, Limits, Verdict
from services.evaluator.problems import Problem
from services.evaluator.records import INFRA, PASSED
from services.evaluator.retry import patiently
from services.evaluator.suites import Suite
from services.evaluator.tasks import task_group
from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import ReferenceRateTooLow, ScoreWithheld
from smeltkit.manifest import REFERENCE_TYPE, Manifest

_FIRST_LIMITS = Limits(
    cpu_s=limits.EVALUATION_CPU_MAX_S,
    wall_s=limits.EVALUATION_CPU_MAX_S * limits.EVALUATION_WALL_FACTOR + limits.EVALUATION_WALL_EXTRA_S,
)


@dataclass(frozen=True, kw_only=True)
class References:
    """What the suite's own solutions did under one judge."""

    suite: str
    suite_digest: str
    data_digest: str
    judge_digest: str
    level: str
    cpu: str
    """Model of the CPU that `cpu_s` was measured on."""
    passed: int
    total: int
    failed: Mapping[str, str]
    """Verdict and detail of each problem whose reference did not pass every time."""
    cpu_s: Mapping[str, float]
    """Worst CPU seconds of each problem's reference."""

    def check_rate(self, suite: Suite) -> None:
        """Raises ReferenceRateTooLow if fewer pass than the suite records: then no score would mean anything."""
        if self.total != suite.problems or self.passed < suite.references_passed:
            worst = "; ".join(f"{name} {verdict}" for name, verdict in list(self.failed.items())[:5])
            raise ReferenceRateTooLow(
                f"{self.passed} of {self.total} reference solutions of {suite.name} pass, {suite.references_passed} of"
                f" {suite.problems} must: {worst}; look at the sandbox before any model's score"
            )

    def limits_of(self, problem: str) -> Limits:
        """The limits of a candidate: the reference's worst CPU time here, many times over, within bounds."""
        cpu_s = self.cpu_s[problem] * limits.EVALUATION_REFERENCE_FACTOR
        cpu_s = min(max(cpu_s, limits.EVALUATION_CPU_MIN_S), limits.EVALUATION_CPU_MAX_S)
        return Limits(cpu_s=cpu_s, wall_s=cpu_s * limits.EVALUATION_WALL_FACTOR + limits.EVALUATION_WALL_EXTRA_S)

    def to_config(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "suite": {"name": self.suite, "digest": self.suite_digest},
            "data": self.data_digest,
            "judge": {"digest": self.judge_digest, "level": self.level, "cpu": self.cpu},
            "passed": self.passed,
            "total": self.total,
            "failed": dict(self.failed),
            "cpu_s": dict(self.cpu_s),
        }

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> References:
        """The record of a stored artifact; BadManifest if it is none."""
        manifest.expect(REFERENCE_TYPE, remedy="give the digest of a record of references")
        value = manifest.config
        return cls(
            suite=value["suite"]["name"],
            suite_digest=value["suite"]["digest"],
            data_digest=value["data"],
            judge_digest=value["judge"]["digest"],
            level=value["judge"]["level"],
            cpu=value["judge"]["cpu"],
            passed=value["passed"],
            total=value["total"],
            failed=value["failed"],
            cpu_s=value["cpu_s"],
        )


def candidate_of(problem: Problem, program: str, bounds: Limits, *, is_rerun_near_limit: bool = True) -> Candidate:
    """`program` as the judge takes it, with the tests of `problem`."""
    return Candidate(
        program=program,
        form=problem.form,
        tests=problem.tests,
        preamble=problem.preamble,
        setup=problem.setup,
        entry_point=problem.entry_point,
        exports=problem.exports,
        limits=bounds,
        seed=problem.id,
        is_rerun_near_limit=is_rerun_near_limit,
        profile=problem.profile,
    )


async def judged(judge: Judge, candidate: Candidate) -> Verdict:
    """The verdict; `infra` is asked again a few times and returned only if it stays."""
    for tries_left in reversed(range(limits.EVALUATION_INFRA_TRIES_MAX)):
        verdict = await patiently("the sandbox", lambda: judge.judge(candidate))
        if verdict.verdict != INFRA or not tries_left:
            break
    return verdict


async def run_references(
    suite: Suite, problems: Sequence[Problem], judge: Judge, info: JudgeInfo, attempt: Attempt
) -> References:
    """Judges every reference several times; ScoreWithheld if the sandbox itself fails on one."""
    waiting, done = iter(problems), 0
    worst: dict[str, Verdict] = {}

    async def work() -> None:
        nonlocal done
        for problem in waiting:
            worst[problem.id] = await _worst_of_runs(problem, judge)
            done += 1
            await attempt.progress("references", done, len(problems), "problems")

    async with task_group() as group:
        for _ in range(2 * info.slots):
            group.create_task(work())
    ordered = {problem.id: worst[problem.id] for problem in problems}
    failed = {
        name: f"{verdict.verdict}: {verdict.detail}" for name, verdict in ordered.items() if verdict.verdict != PASSED
    }
    return References(
        suite=suite.name,
        suite_digest=suite.digest,
        data_digest=suite.data.digest,
        judge_digest=info.digest,
        level=info.level,
        cpu=info.cpu,
        passed=len(problems) - len(failed),
        total=len(problems),
        failed=failed,
        cpu_s={name: verdict.cpu_s for name, verdict in ordered.items()},
    )


async def _worst_of_runs(problem: Problem, judge: Judge) -> Verdict:
    """The first verdict that is no pass, else the pass that took most CPU time."""
    candidate = candidate_of(problem, problem.reference, _FIRST_LIMITS, is_rerun_near_limit=False)
    runs: list[Verdict] = []
    for _ in range(limits.EVALUATION_REFERENCE_RUNS):
        verdict = await judged(judge, candidate)
        if verdict.verdict == INFRA:
            raise ScoreWithheld(f"the sandbox failed on the reference of {problem.id}: {verdict.detail}")
        if verdict.verdict != PASSED:
            return verdict
        runs.append(verdict)
    return max(runs, key=lambda verdict: verdict.cpu_s)


def store_references(store: Store, references: References) -> str:
    """Stores the record as an artifact; its digest."""
    return store.put_manifest(Manifest(artifact_type=REFERENCE_TYPE, config=references.to_config()))
