"""The perplexity of a bundle on a text, as a job: checked, measured through the inference service, stored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smelt.evaluator.v1 import evaluator_pb2

from services.evaluator.bundles import BundleFacts
from services.evaluator.data import DataSource, check_digest
from services.evaluator.inference_client import InferenceClient
from services.evaluator.perplexity import check_sane, check_tokens, measure, perplexity_of
from services.evaluator.perplexity_report import store_perplexity
from services.evaluator.ports import Attempt, Engine
from services.evaluator.retry import patiently
from services.evaluator.spec import is_batch_variant
from services.evaluator.texts import Text
from smeltkit import telemetry
from smeltkit.blobs.store import Store
from smeltkit.errors import BadManifest, EngineUnavailable, PromptTooLong, SmeltError, UnsupportedOption
from smeltkit.jobs.plan import Plan
from smeltkit.jobs.stages import StageCache
from smeltkit.manifest import Manifest
from smeltkit.revision import code_revision

STEPS = ("check data", "load model", "encode", "score windows", "store report")
_UNUSED = ("samples", "temperature", "top_p", "seed", "max_tokens", "limit")
"""Fields of a request that say how completions are sampled."""


def check_request(spec: evaluator_pb2.EvaluationSpec, text: Text) -> None:
    """BadSuite for other data than the text; UnsupportedOption for a setting that has no effect here."""
    check_digest(text, spec.data_digest)
    # The command line names the defaults of sampling: one sample, and all of the probability.
    used = [name for name in _UNUSED if getattr(spec, name) and (name, getattr(spec, name)) not in _DEFAULTS]
    if used:
        raise UnsupportedOption(f"{used[0]} has no effect on the perplexity of {text.name}; leave it out")


@dataclass(frozen=True, kw_only=True)
class PerplexityTask:
    """One bundle on one text."""

    text: Text
    facts: BundleFacts
    vocab_size: int
    concurrency: int

    @classmethod
    def checked(
        cls, spec: evaluator_pb2.EvaluationSpec, text: Text, manifest: Manifest, concurrency: int
    ) -> PerplexityTask:
        """The task of a request; BadManifest, and what `check_request` refuses."""
        check_request(spec, text)
        facts = BundleFacts.from_manifest(manifest)
        try:
            vocab_size = int(manifest.config["architecture"]["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadManifest(f"bundle {manifest.digest} does not tell its vocabulary: {error!r}") from error
        return cls(text=text, facts=facts, vocab_size=vocab_size, concurrency=concurrency)

    def plan(self, data_from: str) -> Plan:
        """What would be done, and why it would be refused."""
        refusals: list[SmeltError] = []
        if self.facts.context_tokens < self.text.window_tokens:
            refusals.append(
                PromptTooLong(
                    f"windows of {self.text.window_tokens} tokens do not fit a context of {self.facts.context_tokens};"
                    f" {self.text.name} cannot be measured on this bundle"
                )
            )
        return Plan(
            steps=STEPS,
            items={
                "text": f"{self.text.name} version {self.text.version}, {self.text.size_bytes} bytes",
                "window": f"{self.text.window_tokens} tokens",
                "stride": f"{self.text.stride_tokens} tokens",
                "concurrency": str(self.concurrency),
                "data": data_from,
                "scheme": self.facts.scheme,
            },
            refusals=tuple(refusals),
        )

    def key(self, stages: StageCache, engine_digest: str) -> str:
        """The key of the result: all that it depends on."""
        parameters = {
            "text": self.text.digest,
            "engine": engine_digest,
            "is_batch_variant": is_batch_variant(self.concurrency),
        }
        return stages.key("perplexity", parameters, [self.facts.digest, self.text.data.digest])


_DEFAULTS = {("samples", 1), ("top_p", 1.0)}


async def measure_bundle(
    task: PerplexityTask,
    *,
    inference: InferenceClient,
    data: DataSource,
    store: Store,
    engine: Engine,
    attempt: Attempt,
    job: dict[str, Any],
) -> str:
    """Measures and stores; the digest of the report. `job` names the job and its attempt.

    TooFewTokens before anything is scored, AbsurdPerplexity before anything is stored. A repeated attempt begins anew:
    a whole text takes a minute where one completion of a large model does.
    """
    began, bundle, text = time.monotonic(), task.facts.digest, task.text
    task.plan("").check()
    raw = await patiently("the text", lambda: asyncio.to_thread(data.read, text))
    ids = await patiently("the inference service", lambda: inference.encode(bundle, raw.decode()))
    check_tokens(len(ids) - 1)

    async def score(window: Sequence[int]) -> Sequence[float]:
        return await patiently("the inference service", lambda: inference.score(bundle, window))

    async def progress(done: int, total: int) -> None:
        await attempt.progress("score", done, total, "windows")

    scoring = time.monotonic()
    with telemetry.span("smelt.evaluate.perplexity", **{telemetry.names.SUITE: text.name}):
        windows = await measure(
            score,
            ids,
            window=text.window_tokens,
            stride=text.stride_tokens,
            concurrency=task.concurrency,
            progress=progress,
        )
    if await patiently("the inference service", lambda: inference.load(bundle)) != engine:
        raise EngineUnavailable("the inference engine changed during the evaluation; the next attempt starts with it")
    check_sane(perplexity_of(windows, len(raw)), task.vocab_size)
    await attempt.check_alive()
    provenance = {
        "bundle": bundle,
        "scheme": task.facts.scheme,
        **task.facts.parts,
        "suite": text.digest,
        "data": text.data.digest,
        "code_revision": code_revision(),
        "concurrency": task.concurrency,
        "is_batch_variant": is_batch_variant(task.concurrency),
        "trace": telemetry.current_trace_id(),
        **job,
    }
    times = {"generate_s": round(time.monotonic() - scoring, 3), "total_s": round(time.monotonic() - began, 3)}
    return await asyncio.to_thread(
        lambda: store_perplexity(
            store,
            text,
            windows,
            len(raw),
            engine={"name": engine.name, "digest": engine.digest},
            provenance=provenance,
            times=times,
        )
    )
