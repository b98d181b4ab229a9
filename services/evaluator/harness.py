"""One evaluation in four phases: references, prepare, generate (the judge works beside it), score.

    references -> prompts -> [generate x concurrency] -> queue -> [judge x slots] -> batches -> samples

Nothing here knows gRPC, NATS or S3. A sample is stored once it is judged; an attempt that follows generates only what
is not stored. Components that are away are waited for, up to a bound, and then missed by a retryable error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from services.evaluator.extract import extract
from services.evaluator.pace import Pace
from services.evaluator.ports import Attempt, Completion, Engine, Generation, Inference, Judge, JudgeInfo
from services.evaluator.problems import Problem
from services.evaluator.prompts import Prompt
from services.evaluator.records import INFRA, Batches, Sample, Samples
from services.evaluator.references import References, candidate_of, judged
from services.evaluator.retry import patiently
from services.evaluator.settings import Settings, check_effective, sample_seed
from services.evaluator.suites import Suite
from services.evaluator.tasks import task_group
from smeltkit import limits
from smeltkit.errors import EngineUnavailable, ModelReloaded, PromptTooLong, ScoreWithheld

NO_ROOM = "none"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is evaluated: one bundle on the problems of one suite. Problems and prompts have one order."""

    bundle: str
    suite: Suite
    settings: Settings
    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]
    thinking: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Every sample, by problem and then by number, what served them, and how long it took."""

    samples: tuple[Sample, ...]
    used: Mapping[str, Any]
    """Engine and settings in force, as the inference service told; the same for every sample."""
    resumed: int
    """Samples that an earlier attempt had stored."""
    generate_s: float
    loads: int
    """Loads of the model that served this attempt: one a replica, unless its service was started again."""
    token_s: float
    """Seconds a token of the slowest completion of this attempt, from which its time-outs followed; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    problem: Problem
    sample: int
    completion: Completion
    max_tokens: int


class Harness:
    """Runs one evaluation for one attempt at a job; made for one run."""

    def __init__(
        self,
        task: Task,
        references: References,
        *,
        inference: Inference,
        judge: Judge,
        engine: Engine,
        judge_info: JudgeInfo,
        attempt: Attempt,
        batches: Batches,
        concurrency: int,
    ) -> None:
        self._task, self._references = task, references
        self._inference, self._judge, self._attempt, self._batches = inference, judge, attempt, batches
        self._engine, self._judges, self._concurrency = engine, 2 * judge_info.slots, concurrency
        self._done: Samples = {}
        self._pace, self._loads = Pace(), set[tuple[str, str]]()
        self._passed = 0
        self._infra: list[str] = []

    async def run(self) -> Outcome:
        """All samples, judged. ScoreWithheld if the sandbox itself failed on some: all others are stored by then."""
        self._done = await patiently("the store", self._batches.load)
        self._passed = sum(sample.has_passed for sample in self._done.values())
        resumed, missing = len(self._done), iter(self._missing())
        queue: asyncio.Queue[_Answer | None] = asyncio.Queue(maxsize=2 * self._judges)
        await self._tell()
        async with task_group() as judges:
            for _ in range(self._judges):
                judges.create_task(self._judge_all(queue))
            async with task_group() as generators:
                for _ in range(self._concurrency):
                    generators.create_task(self._generate_all(missing, queue))
            for _ in range(self._judges):
                await queue.put(None)
        await patiently("the store", lambda: self._batches.settle(is_last=True))
        if self._infra:
            raise ScoreWithheld(
                f"the sandbox failed on {len(self._infra)} of {self._total} samples, first on {self._infra[0]}; see its"
                " log and start the evaluation again: what is judged is kept"
            )
        return Outcome(
            samples=tuple(self._done[key] for key in self._keys()),
            used=self._batches.used,
            resumed=resumed,
            generate_s=self._batches.generate_s,
            loads=len(self._loads),
            token_s=self._pace.token_s,
        )

    @property
    def _total(self) -> int:
        return len(self._task.problems) * self._task.settings.samples

    def _keys(self) -> list[tuple[str, int]]:
        return [
            (problem.id, sample) for problem in self._task.problems for sample in range(self._task.settings.samples)
        ]

    def _missing(self) -> list[tuple[Problem, Prompt, int]]:
        """What is to be generated; samples of one problem side by side, so that they can share its prompt's cells."""
        pairs = {
            problem.id: (problem, prompt)
            for problem, prompt in zip(self._task.problems, self._task.prompts, strict=True)
        }
        return [(*pairs[name], sample) for name, sample in self._keys() if (name, sample) not in self._done]

    async def _generate_all(
        self, missing: Iterator[tuple[Problem, Prompt, int]], queue: asyncio.Queue[_Answer | None]
    ) -> None:
        for problem, prompt, sample in missing:
            await queue.put(await self._generate(problem, prompt, sample))

    async def _generate(self, problem: Problem, prompt: Prompt, sample: int) -> _Answer:
        settings = self._task.settings
        generation = Generation(
            problem=problem.id,
            sample=sample,
            bundle=self._task.bundle,
            prompt=prompt,
            max_tokens=settings.max_tokens,
            stop=self._task.suite.stop,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=sample_seed(settings.seed, problem.id, sample),
        )
        try:
            completion = await self._complete(generation)
        except PromptTooLong:
            tokens = await patiently("generation", lambda: self._inference.count_tokens(generation))
            generation = replace(generation, max_tokens=self._engine.context_tokens - tokens)
            if generation.max_tokens <= 0:
                return _Answer(problem=problem, sample=sample, completion=_no_room(tokens), max_tokens=0)
            completion = await self._complete(generation)
        self._check(generation, completion)
        return _Answer(problem=problem, sample=sample, completion=completion, max_tokens=generation.max_tokens)

    async def _complete(self, generation: Generation) -> Completion:
        """One completion, given the time that the pace so far allows its tokens, and measured."""

        async def once() -> Completion:
            began, timeout_s = time.monotonic(), self._pace.timeout_s(generation.max_tokens)
            completion = await self._inference.generate(replace(generation, timeout_s=timeout_s))
            self._pace.add(completion.completion_tokens, time.monotonic() - began)
            return completion

        return await patiently("generation", once)

    def _check(self, generation: Generation, completion: Completion) -> None:
        """Holds what was used against what was asked for, and against what served the samples before."""
        check_effective(generation.settings(), completion.effective)
        if completion.engine["digest"] != self._engine.digest:
            raise EngineUnavailable(
                "the inference engine changed during the evaluation; the next attempt starts with it"
            )
        self._loads.add((completion.replica_id, completion.load_id))
        loads = sum(replica_id == completion.replica_id for replica_id, _ in self._loads)
        if loads > limits.EVALUATION_LOADS_MAX:
            raise ModelReloaded(
                f"the model was loaded {loads} times by one replica for {len(self._done)} samples, at most"
                f" {limits.EVALUATION_LOADS_MAX} loads are allowed; give the inference service the memory to keep it"
            )
        self._batches.used = {"engine": dict(completion.engine), "sampling": _common(completion.effective)}

    async def _judge_all(self, queue: asyncio.Queue[_Answer | None]) -> None:
        while (answer := await queue.get()) is not None:
            sample = await self._judge_one(answer)
            if sample.verdict == INFRA:
                self._infra.append(f"{sample.problem}: {sample.detail}")
                continue
            self._done[sample.problem, sample.sample] = sample
            self._passed += sample.has_passed
            self._batches.add(sample)
            await patiently("the store", self._batches.settle)
            await self._tell()

    async def _judge_one(self, answer: _Answer) -> Sample:
        problem, completion = answer.problem, answer.completion
        extraction = await asyncio.to_thread(
            extract, problem, self._task.suite.joins, completion.text, self._task.thinking
        )
        bounds = self._references.limits_of(problem.id)
        verdict = await judged(self._judge, candidate_of(problem, extraction.program, bounds))
        return Sample(
            problem=problem.id,
            sample=answer.sample,
            seed=sample_seed(self._task.settings.seed, problem.id, answer.sample),
            reply=completion.text,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            max_tokens=answer.max_tokens,
            program=extraction.program,
            join=extraction.join,
            is_trimmed=extraction.is_trimmed,
            verdict=verdict.verdict,
            detail=verdict.detail,
            facts={"cpu_s": verdict.cpu_s, "cpu_limit_s": bounds.cpu_s, **verdict.facts},
        )

    async def _tell(self) -> None:
        await self._attempt.progress("generate", len(self._done), self._total, "samples", f"{self._passed} passed")


def _common(effective: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are the same for every sample."""
    return {name: value for name, value in effective.items() if name not in ("seed", "max_tokens", "dropped_tokens")}


def _no_room(prompt_tokens: int) -> Completion:
    """The answer of a model whose context the prompt fills: none."""
    return Completion(
        text="",
        finish_reason=NO_ROOM,
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        effective={},
        engine={},
    )
