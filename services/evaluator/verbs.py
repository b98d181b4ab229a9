"""What the evaluator does when it is called: plan, start a job, read and compare reports, decide gates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smelt.evaluator.v1 import evaluator_pb2
from smelt.event.v1 import event_pb2
from smelt.job.v1 import job_pb2

from services.evaluator import gates, stats
from services.evaluator.bundles import BundleFacts
from services.evaluator.data import check_digest
from services.evaluator.perplexity_job import PerplexityTask, check_request
from services.evaluator.perplexity_report import open_result
from services.evaluator.plan import plan_evaluation
from services.evaluator.report import Report, check_same_harness
from services.evaluator.sandbox_client import SandboxClient
from services.evaluator.settings import Settings
from services.evaluator.spec import concurrency_of, evaluation_key, settings_of
from services.evaluator.suites import Suite, find_suite
from services.evaluator.texts import Text, texts
from services.evaluator.worker import Tools
from smeltkit.errors import BadFile, NotFound, Refused, ReportMismatch, SmeltError, UnknownBlob
from smeltkit.ids import check_digest as check_form
from smeltkit.jobs.ledger import JobLedger
from smeltkit.jobs.plan import Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two reports of one suite, paired by problem."""

    result: stats.Comparison
    gained: tuple[str, ...]
    lost: tuple[str, ...]


class Evaluator:
    """The verbs of the service, as plain calls."""

    def __init__(self, tools: Tools, ledger: JobLedger) -> None:
        self._tools, self._ledger = tools, ledger

    async def plan_evaluation(self, spec: evaluator_pb2.EvaluationSpec) -> Plan:
        """The plan of an evaluation, every reason against it included."""
        return (await self._plan(spec))[0]

    async def start_evaluation(self, spec: evaluator_pb2.EvaluationSpec, request_id: str) -> job_pb2.Job:
        """A job that evaluates the bundle which the name means now; it has succeeded at once if that is stored."""
        plan, pinned = await self._plan(spec)
        plan.check()
        return await self._ledger.start(
            service="evaluator",
            kind="evaluate",
            request=pinned,
            request_id=request_id,
            cached_digest=plan.cached_digest,
        )

    async def start_judgement(self, spec: evaluator_pb2.JudgementSpec, request_id: str) -> job_pb2.Job:
        """A job that judges stored completions; UnknownBlob if they are not stored."""
        suite = find_suite(spec.suite)
        check_digest(suite, spec.data_digest)
        if await asyncio.to_thread(self._tools.store.size, check_form(spec.completions_digest)) is None:
            raise UnknownBlob(f"completions {spec.completions_digest} are not stored; upload the file first")
        await asyncio.to_thread(self._tools.data.where, suite)
        return await self._ledger.start(service="evaluator", kind="judge", request=spec, request_id=request_id)

    async def start_references(self, spec: evaluator_pb2.ReferenceSpec, request_id: str) -> job_pb2.Job:
        """A job that judges a suite's reference solutions."""
        suite = find_suite(spec.suite)
        check_digest(suite, spec.data_digest)
        await asyncio.to_thread(self._tools.data.where, suite)
        return await self._ledger.start(service="evaluator", kind="references", request=spec, request_id=request_id)

    async def report(self, digest: str) -> Report:
        """A stored report or judgement."""
        return await asyncio.to_thread(open_result, self._tools.store, check_form(digest))

    async def compare(self, baseline: str, candidate: str) -> Comparison:
        """The paired comparison of two reports; ReportMismatch unless one harness ran the same problems of both."""
        old, new = await self.report(baseline), await self.report(candidate)
        if (old.suite_digest, old.data_digest) != (new.suite_digest, new.data_digest):
            raise ReportMismatch(f"{old.suite} and {new.suite} were not measured alike; compare reports of one suite")
        before, after = old.rates(), new.rates()
        if not before:
            raise ReportMismatch(f"{old.suite} has no problems to pair; compare the intervals of the two perplexities")
        if list(before) != list(after):
            raise ReportMismatch(f"one report has {len(before)} problems, the other {len(after)}; run the same of both")
        check_same_harness(old, new)
        result = await asyncio.to_thread(stats.compare, list(before.values()), list(after.values()))
        return Comparison(
            result=result,
            gained=tuple(name for name in before if not before[name] and after[name]),
            lost=tuple(name for name in before if before[name] and not after[name]),
        )

    async def check_gate(
        self, bundle: str, reports: Sequence[str], clauses: Sequence[str]
    ) -> tuple[gates.Decision, ...]:
        """Each clause decided; a report that cannot be opened is missing, and what is missing is NOT MET."""
        parsed, check_bundle = gates.parse_gate(clauses), check_form(bundle)
        opened = [report for digest in reports if (report := await self._open(check_form(digest))) is not None]
        decisions = gates.decide(parsed, check_bundle, opened)
        for decision in decisions:
            if not decision.is_met:
                failed = event_pb2.GateFailed(bundle_digest=bundle, gate=decision.clause, measured=decision.measured)
                await self._tools.bus.publish_event("evaluator.gate.failed", failed)
        return decisions

    async def _open(self, digest: str) -> Report | None:
        try:
            return await self.report(digest)
        except (NotFound, BadFile, Refused) as error:
            _log.warning("a gate was given no report: %s", error)
            return None

    async def _plan(self, spec: evaluator_pb2.EvaluationSpec) -> tuple[Plan, evaluator_pb2.EvaluationSpec]:
        known = texts().get(spec.suite) or find_suite(spec.suite)
        concurrency = concurrency_of(spec, self._tools.config.concurrency)
        # Before the bundle is looked for, which a pipeline may have yet to make.
        if isinstance(known, Text):
            check_request(spec, known)
        else:
            settings_of(spec, known)
        bundle = await self._tools.catalog.resolve(spec.bundle)
        manifest = await asyncio.to_thread(self._tools.store.get_manifest, bundle)
        data_from, refusals = await self._find_data(known)
        if isinstance(known, Text):
            task = PerplexityTask.checked(spec, known, manifest, concurrency)
            plan, cached = task.plan(data_from), await self._cached_perplexity(task)
        else:
            facts = BundleFacts.from_manifest(manifest)
            settings = settings_of(spec, known, facts)
            plan = plan_evaluation(known, settings, facts, data_from, concurrency)
            cached = await self._cached(known, settings, bundle, concurrency)
        pinned = evaluator_pb2.EvaluationSpec()
        pinned.CopyFrom(spec)
        pinned.bundle = bundle
        return replace(plan, refusals=(*plan.refusals, *refusals), cached_digest=cached), pinned

    async def _cached_perplexity(self, task: PerplexityTask) -> str:
        """The stored result of the same measurement, if the engine that it would use is there to tell."""
        try:
            engine = await self._tools.inference.loaded(task.facts.digest)
        except SmeltError as error:
            _log.info("no stored result is looked up: %s", error)
            return ""
        return "" if engine is None else await self._tools.stages.get(task.key(self._tools.stages, engine.digest)) or ""

    async def _find_data(self, suite: Suite | Text) -> tuple[str, list[SmeltError]]:
        """Where the data would come from, and why not if from nowhere."""
        try:
            return await asyncio.to_thread(self._tools.data.where, suite), []
        except UnknownBlob as error:
            return "", [error]

    async def _cached(self, suite: Suite, settings: Settings, bundle: str, concurrency: int) -> str:
        """The stored result of the same evaluation, if the engine and judge that it would use are there to tell."""
        try:
            async with SandboxClient(self._tools.sandbox) as judge:
                info, engine = await judge.describe(), await self._tools.inference.loaded(bundle)
        except SmeltError as error:
            _log.info("no stored result is looked up: %s", error)
            return ""
        if engine is None:
            return ""
        key = evaluation_key(self._tools.stages, bundle, suite, settings, engine.digest, info, concurrency=concurrency)
        return await self._tools.stages.get(key) or ""
