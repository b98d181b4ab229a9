"""Jobs to domain: evaluate, judge, references. Each may run again and goes on from what earlier attempts stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import grpc
from smelt.evaluator.v1 import evaluator_pb2
from smelt.event.v1 import event_pb2

from services.evaluator.bundles import BundleFacts
from services.evaluator.config import EvaluatorConfig
from services.evaluator.data import DataSource, check_digest
from services.evaluator.extract import THINKING
from services.evaluator.harness import Harness, Outcome, Task
from services.evaluator.inference_client import InferenceClient
from services.evaluator.perplexity_job import PerplexityTask, measure_bundle
from services.evaluator.perplexity_report import open_result
from services.evaluator.ports import Engine, Inference, Judge, JudgeInfo
from services.evaluator.problems import Problem, load_problems
from services.evaluator.prompts import build_prompts, prompts_digest
from services.evaluator.records import Batches
from services.evaluator.references import References, run_references, store_references
from services.evaluator.report import store_report
from services.evaluator.retry import patiently
from services.evaluator.sandbox_client import SandboxClient
from services.evaluator.settings import Settings
from services.evaluator.spec import concurrency_of, evaluation_key, is_batch_variant, references_key, settings_of
from services.evaluator.stored import StoredCompletions, read_completions
from services.evaluator.suites import Suite, find_suite
from services.evaluator.texts import Text, texts
from smeltkit import telemetry
from smeltkit.blobs.store import Store
from smeltkit.bus.client import Bus
from smeltkit.catalog import Catalog
from smeltkit.jobs.stages import StageCache
from smeltkit.jobs.worker import Handler, JobContext
from smeltkit.revision import code_revision

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the evaluator works with."""

    config: EvaluatorConfig
    store: Store
    stages: StageCache
    catalog: Catalog
    bus: Bus
    data: DataSource
    inference: InferenceClient
    sandbox: grpc.aio.Channel


@dataclass(frozen=True, kw_only=True)
class _Court:
    """A judge, what it says of itself, and the suite that it judges by."""

    judge: Judge
    info: JudgeInfo
    suite: Suite
    problems: tuple[Problem, ...]


class Handlers:
    """The kinds of jobs of the evaluator."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def by_kind(self) -> Mapping[str, Handler]:
        """Kind of job to what does it."""
        return {"evaluate": self.evaluate, "judge": self.judge, "references": self.references}

    async def evaluate(self, context: JobContext) -> str:
        """Scores the bundle of an EvaluationSpec; the digest of the report."""
        began, tools = time.monotonic(), self._tools
        spec = evaluator_pb2.EvaluationSpec.FromString(context.request)
        if (text := texts().get(spec.suite)) is not None:
            return await self._perplexity(context, spec, text)
        facts = BundleFacts.from_manifest(await _patient_thread(tools.store.get_manifest, spec.bundle))
        settings = settings_of(spec, find_suite(spec.suite), facts)
        concurrency = concurrency_of(spec, tools.config.concurrency)
        async with self._court(spec.suite, spec.data_digest) as court:
            facts.check_can_take(court.suite)
            await context.progress("prepare", 0, 0, message="loading the model")
            engine = await patiently("the inference service", lambda: tools.inference.load(spec.bundle))
            key = evaluation_key(
                tools.stages, spec.bundle, court.suite, settings, engine.digest, court.info, concurrency=concurrency
            )
            if stored := await tools.stages.get(key):
                await context.progress("score", 1, 1, "reports", "the stored result of the same evaluation")
                return await self._published(context, stored)
            task = _task(spec.bundle, court, settings, facts.thinking)
            references, outcome = await self._run(context, court, task, tools.inference, engine, key, concurrency)
        provenance = {
            "bundle": spec.bundle,
            "scheme": facts.scheme,
            **facts.parts,
            **_provenance(task, court.info, references),
            "concurrency": concurrency,
            "is_batch_variant": is_batch_variant(concurrency),
        }
        return await self._published(context, await self._store(context, key, task, outcome, provenance, began))

    async def _perplexity(self, context: JobContext, spec: evaluator_pb2.EvaluationSpec, text: Text) -> str:
        tools, concurrency = self._tools, concurrency_of(spec, self._tools.config.concurrency)
        manifest = await _patient_thread(tools.store.get_manifest, spec.bundle)
        task = PerplexityTask.checked(spec, text, manifest, concurrency)
        await context.progress("prepare", 0, 0, message="loading the model")
        engine = await patiently("the inference service", lambda: tools.inference.load(spec.bundle))
        key = task.key(tools.stages, engine.digest)
        digest = await tools.stages.get(key)
        if digest is None:
            digest = await measure_bundle(
                task,
                inference=tools.inference,
                data=tools.data,
                store=tools.store,
                engine=engine,
                attempt=context,
                job={"job": context.job_id, "attempt": context.attempt},
            )
            await context.check_alive()
            await tools.stages.put(key, digest)
        return await self._published(context, digest)

    async def judge(self, context: JobContext) -> str:
        """Judges the stored completions of a JudgementSpec; the digest of the judgement."""
        began, tools = time.monotonic(), self._tools
        spec = evaluator_pb2.JudgementSpec.FromString(context.request)
        source = spec.completions_digest
        data = await _patient_thread(tools.store.get_bytes, source)
        async with self._court(spec.suite, spec.data_digest) as court:
            stored = StoredCompletions(source, read_completions(data, court.problems))
            settings = stored.settings(court.suite)
            key = evaluation_key(tools.stages, source, court.suite, settings, source, court.info, concurrency=1)
            if found := await tools.stages.get(key):
                return found
            task = _task(source, court, settings, THINKING)
            engine, concurrency = await stored.load(source), 2 * court.info.slots
            references, outcome = await self._run(context, court, task, stored, engine, key, concurrency)
        provenance = {"bundle": "", "completions": source, **_provenance(task, court.info, references)}
        return await self._store(context, key, task, outcome, provenance, began)

    async def references(self, context: JobContext) -> str:
        """Judges the reference solutions of a ReferenceSpec; the digest of the reference record."""
        spec = evaluator_pb2.ReferenceSpec.FromString(context.request)
        async with self._court(spec.suite, spec.data_digest) as court:
            return (await self._references(context, court))[0]

    @asynccontextmanager
    async def _court(self, name: str, data_digest: str) -> AsyncIterator[_Court]:
        """The judge of a suite whose data has the digest that the request names."""
        suite = find_suite(name)
        check_digest(suite, data_digest)
        data = await patiently("the suite's data", lambda: asyncio.to_thread(self._tools.data.read, suite))
        problems = await asyncio.to_thread(load_problems, suite, data)
        async with SandboxClient(self._tools.sandbox) as judge:
            info = await patiently("the sandbox", judge.describe)
            yield _Court(judge=judge, info=info, suite=suite, problems=problems)

    async def _run(
        self,
        context: JobContext,
        court: _Court,
        task: Task,
        inference: Inference,
        engine: Engine,
        key: str,
        concurrency: int,
    ) -> tuple[str, Outcome]:
        """References first, then every sample; the digest of the reference record, and the outcome."""
        digest, references = await self._references(context, court)
        references.check_rate(court.suite)
        harness = Harness(
            task,
            references,
            inference=inference,
            judge=court.judge,
            engine=engine,
            judge_info=court.info,
            attempt=context,
            batches=Batches(self._tools.store, key, context),
            concurrency=concurrency,
        )
        with telemetry.span("smelt.evaluate.generate", **{telemetry.names.SUITE: court.suite.name}):
            return digest, await harness.run()

    async def _references(self, context: JobContext, court: _Court) -> tuple[str, References]:
        """The suite's references under this judge: judged once, found again afterwards; digest and record."""
        store, stages, suite = self._tools.store, self._tools.stages, court.suite
        key = references_key(stages, suite, court.info)
        if stored := await stages.get(key):
            return stored, References.from_manifest(await _patient_thread(store.get_manifest, stored))
        with telemetry.span("smelt.evaluate.references", **{telemetry.names.SUITE: suite.name}):
            references = await run_references(suite, court.problems, court.judge, court.info, context)
        await context.check_alive()
        digest = await _patient_thread(store_references, store, references)
        if references.passed >= suite.references_passed:
            await stages.put(key, digest)
        return digest, references

    async def _store(
        self, context: JobContext, key: str, task: Task, outcome: Outcome, provenance: Mapping[str, Any], began: float
    ) -> str:
        await context.progress("score", 0, 1, "reports")
        await context.check_alive()
        times = {
            "generate_s": round(outcome.generate_s, 3),
            "total_s": round(time.monotonic() - began, 3),
            "slowest_token_s": round(outcome.token_s, 6),
        }
        provenance = {
            **provenance,
            "resumed_samples": outcome.resumed,
            "model_loads": outcome.loads,
            "attempt": context.attempt,
            "job": context.job_id,
            "trace": telemetry.current_trace_id(),
        }
        work = partial(
            store_report,
            self._tools.store,
            task.suite,
            task.settings,
            outcome.samples,
            used=outcome.used,
            provenance=provenance,
            times=times,
        )
        with telemetry.span("smelt.evaluate.score", **{telemetry.names.SUITE: task.suite.name}):
            digest = await _patient_thread(work)
        await context.check_alive()
        await self._tools.stages.put(key, digest)
        return digest

    async def _published(self, context: JobContext, digest: str) -> str:
        """Tells the world of a report, once a job however often it is tried; its digest."""
        report = await _patient_thread(open_result, self._tools.store, digest)
        score = report.scores[0]
        finished = event_pb2.EvaluationFinished(
            report_digest=digest,
            bundle_digest=report.bundle,
            suite=score.suite,
            passed=score.passed,
            total=score.problems,
            job_id=context.job_id,
        )
        await self._tools.bus.publish_event("evaluator.evaluation.finished", finished)
        return digest


async def _patient_thread(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """What `work` on the store returns, in a thread; a store that is away is waited for, and costs no attempt."""
    return await patiently("the store", lambda: asyncio.to_thread(work, *args, **options))


def _task(model: str, court: _Court, settings: Settings, thinking: tuple[str, str]) -> Task:
    chosen = court.problems[: settings.problems]
    return Task(
        bundle=model,
        suite=court.suite,
        settings=settings,
        problems=chosen,
        prompts=build_prompts(court.suite, chosen),
        thinking=thinking,
    )


def _provenance(task: Task, info: JudgeInfo, references: str) -> dict[str, Any]:
    """Digests of everything but the model that a score rests on."""
    suite = task.suite
    return {
        "suite": suite.digest,
        "data": suite.data.digest,
        "prompt": {
            "builder": suite.builder,
            "version": suite.prompt_version,
            "digest": prompts_digest(task.prompts),
        },
        "judge": {"digest": info.digest, "level": info.level, "profile": info.profile(suite.profile)},
        "references": references,
        "code_revision": code_revision(),
    }
