"""An inference service that answers by table and a sandbox that runs trusted programs, both on real sockets.

For tests of the evaluator's order of events: what is asked, how often, and what happens when either is away. The fake
sandbox executes in the test's own process, so it is for programs that the test itself wrote.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from smelt.inference.v1 import inference_pb2, inference_pb2_grpc
from smelt.sandbox.v1 import sandbox_pb2, sandbox_pb2_grpc

from smeltkit.errors import PromptTooLong, SmeltError
from smeltkit.ids import digest_bytes
from smeltkit.rpc.context import RpcContext
from smeltkit.rpc.server import RpcConfig, ServiceHost

ENGINE_DIGEST = digest_bytes(b"fake engine")
JUDGE_DIGEST = digest_bytes(b"fake judge")


@dataclass
class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Answers a prompt by `reply`, a function of prompt text and seed; a word counts as a token."""

    reply: Callable[[str, int], str]
    context_tokens: int = 2048
    engine_digest: str = ENGINE_DIGEST
    delay_s: float = 0.0
    failures: list[SmeltError] = field(default_factory=list)
    """Errors for the next calls, one each."""
    change: dict[str, Any] = field(default_factory=dict)
    """Fields of the effective settings that differ from what was requested."""
    reloads_each_time: bool = False
    """Whether every completion comes from another load of the model."""
    replicas: int = 1
    """Processes that answer in turn, as a router spreads requests."""
    asked: Counter[str] = field(default_factory=Counter)
    """Generations by request id."""
    loaded: set[str] = field(default_factory=set)
    logprob: float = -3.0
    """Log-probability of each token that is scored."""
    scored: int = 0
    """Calls of Score."""
    loads: int = 0
    """Times that a model was asked to be loaded."""
    most_running: int = 0
    _running: int = 0

    async def Load(self, request: inference_pb2.LoadRequest, context: RpcContext) -> inference_pb2.LoadResponse:
        self.loaded.add(request.model)
        self.loads += 1
        return inference_pb2.LoadResponse(model=self._model(request.model))

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: RpcContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[self._model(digest) for digest in sorted(self.loaded)])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: RpcContext
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(ids=range(len(_text(request).split())))

    async def Score(self, request: inference_pb2.ScoreRequest, context: RpcContext) -> inference_pb2.ScoreResponse:
        ids = request.tokens.ids
        self.scored += 1
        return inference_pb2.ScoreResponse(ids=ids, logprobs=[0.0, *(self.logprob for _ in ids[1:])])

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: RpcContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if self.failures:
            raise self.failures.pop(0)
        prompt = _text(request)
        prompt_tokens = len(prompt.split())
        if prompt_tokens + request.max_tokens > self.context_tokens:
            raise PromptTooLong(f"{prompt_tokens} + {request.max_tokens} tokens do not fit into {self.context_tokens}")
        self.asked[request.request_id] += 1
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self._running -= 1
        text, finish, count = _cut(self.reply(prompt, request.sampling.seed), request)
        yield inference_pb2.GenerateResponse(effective=self._effective(request, prompt_tokens))
        yield inference_pb2.GenerateResponse(text=text, finish_reason=finish, completion_tokens=count)

    def _model(self, digest: str) -> inference_pb2.Model:
        return inference_pb2.Model(
            digest=digest,
            state=inference_pb2.MODEL_STATE_READY,
            engine="fake",
            engine_digest=self.engine_digest,
            context_tokens=self.context_tokens,
            slots=4,
        )

    def _effective(self, request: inference_pb2.GenerateRequest, prompt_tokens: int) -> inference_pb2.Effective:
        count = sum(self.asked.values())
        fields: dict[str, Any] = {
            "model": request.model,
            "engine": "fake",
            "engine_digest": self.engine_digest,
            "device": "cpu",
            "sampling": request.sampling,
            "max_tokens": request.max_tokens,
            "prompt_tokens": prompt_tokens,
            "load_id": f"load-{count if self.reloads_each_time else count % self.replicas}",
            "replica_id": f"replica-{count % self.replicas}",
        }
        return inference_pb2.Effective(**{**fields, **self.change})


@dataclass
class FakeSandbox(sandbox_pb2_grpc.SandboxServiceServicer):
    """Judges by running program and tests here; `forced` gives the next verdicts instead, one each."""

    slots: int = 2
    judge_digest: str = JUDGE_DIGEST
    cpu: str = "a CPU"
    cpu_s: float = 0.01
    forced: list[sandbox_pb2.Verdict.ValueType] = field(default_factory=list)
    broken_on: str = ""
    """Programs that contain this text are answered with an infrastructure error."""
    refused_on: str = ""
    """Programs that contain this text are refused."""
    judged: list[sandbox_pb2.Candidate] = field(default_factory=list)
    """Every candidate, in order of arrival."""

    async def Describe(self, request: sandbox_pb2.DescribeRequest, context: RpcContext) -> sandbox_pb2.DescribeResponse:
        return sandbox_pb2.DescribeResponse(
            level="jail", slots=self.slots, judge_digest=self.judge_digest, cpu=self.cpu
        )

    async def JudgeBatch(
        self, request_iterator: AsyncIterator[sandbox_pb2.JudgeBatchRequest], context: RpcContext
    ) -> AsyncIterator[sandbox_pb2.JudgeBatchResponse]:
        async for request in request_iterator:
            first = self._answer(request.candidate)
            more = [sandbox_pb2.BatchRecord(id=asked.id, **self._answer(asked.candidate)) for asked in request.more]
            yield sandbox_pb2.JudgeBatchResponse(id=request.id, more=more, **first)

    def _answer(self, candidate: sandbox_pb2.Candidate) -> dict[str, Any]:
        if self.refused_on and self.refused_on.encode() in candidate.code:
            return {"refusal": sandbox_pb2.Refusal(reason="BAD_CODE", message="refused")}
        return {"record": self._record(candidate)}

    def _record(self, candidate: sandbox_pb2.Candidate) -> sandbox_pb2.Record:
        self.judged.append(candidate)
        verdict, detail = _judge(candidate)
        if self.broken_on and self.broken_on.encode() in candidate.code:
            verdict, detail = sandbox_pb2.VERDICT_INFRA, "broken"
        elif self.forced:
            verdict, detail = self.forced.pop(0), "forced"
        return sandbox_pb2.Record(
            verdict=verdict,
            detail=detail,
            mode=sandbox_pb2.MODE_SPLIT,
            level="jail",
            cpu_s=self.cpu_s,
            judge_digest=self.judge_digest,
        )


@asynccontextmanager
async def serving_fakes(
    inference: FakeInference | None, sandbox: FakeSandbox | None, listen: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    """A server with either or both of the fakes; its address."""
    host = ServiceHost("fakes", RpcConfig(listen=listen, drain_grace_s=0))
    if inference is not None:
        add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
        host.add("smelt.inference.v1.InferenceService", add, inference)
    if sandbox is not None:
        add_sandbox = sandbox_pb2_grpc.add_SandboxServiceServicer_to_server
        host.add("smelt.sandbox.v1.SandboxService", add_sandbox, sandbox)
    host.set_ready(True)
    await host.start()
    try:
        yield host.address
    finally:
        await host.stop()


def _text(request: Any) -> str:
    return request.text or " ".join(message.content for message in request.chat.messages)


def _cut(text: str, request: inference_pb2.GenerateRequest) -> tuple[str, inference_pb2.FinishReason.ValueType, int]:
    """The text up to its first stop string or its token limit, why it ended, and its tokens."""
    ends = [text.index(stop) for stop in request.stop if stop in text]
    text = text[: min(ends)] if ends else text
    words = text.split(" ")
    if len(words) > request.max_tokens:
        return " ".join(words[: request.max_tokens]), inference_pb2.FINISH_REASON_LENGTH, request.max_tokens
    return text, inference_pb2.FINISH_REASON_STOP, len(words)


def _judge(candidate: sandbox_pb2.Candidate) -> tuple[sandbox_pb2.Verdict.ValueType, str]:
    names: dict[str, Any] = {}
    try:
        program = compile(candidate.code, "program", "exec")
    except SyntaxError as error:
        return sandbox_pb2.VERDICT_SYNTAX, str(error)
    try:
        exec(program, names)
        tests = {name: names[name] for name in candidate.exports}
        exec(f"{candidate.preamble}\n{candidate.setup}\n{candidate.tests}", tests)
        if candidate.form == sandbox_pb2.FORM_CHECK:
            tests["check"](names[candidate.entry_point])
    except KeyError as error:
        return sandbox_pb2.VERDICT_NO_CODE, str(error)
    except AssertionError as error:
        return sandbox_pb2.VERDICT_WRONG, str(error)
    except Exception as error:
        return sandbox_pb2.VERDICT_EXCEPTION, repr(error)
    return sandbox_pb2.VERDICT_PASSED, ""
