"""The inference service's calls: translation between messages and the domain, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from services.inference.language import Language, Prompt
from services.inference.library import Library, Loaded
from services.inference.load import Load
from services.inference.model import Completion, GenerateOptions
from services.inference.models import Entry, Models, State
from services.inference.observe import observed
from services.inference.probe import ProbeResult, stopped_share
from services.inference.stream import Detail, Finish, Piece
from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.ids import check_digest, new_id
from smeltkit.ml.sampling import SamplingParams
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.routing.demand import demand_of
from smeltkit.rpc.context import RpcContext

_FINISH = {
    Finish.STOP: pb.FINISH_REASON_STOP,
    Finish.LENGTH: pb.FINISH_REASON_LENGTH,
    Finish.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
_STATE = {
    State.LOADING: pb.MODEL_STATE_LOADING,
    State.READY: pb.MODEL_STATE_READY,
    State.FAILED: pb.MODEL_STATE_FAILED,
    State.DRAINING: pb.MODEL_STATE_DRAINING,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See inference.proto for what each call promises."""

    def __init__(self, models: Models, library: Library, load: Load) -> None:
        self._models = models
        self._library = library
        self._load = load
        self._id = new_id("replica")

    async def Generate(self, request: pb.GenerateRequest, context: RpcContext) -> AsyncIterator[pb.GenerateResponse]:
        options, digest = _options(request), check_digest(request.model)
        with self._load.request(demand_of("", request).tokens) as runs:
            async with self._models.use(digest) as loaded:
                prompt = await _encode(loaded.model.language, request)
                completion = loaded.model.generate(prompt, options)
                tokenizer, effective = loaded.model.language.tokenizer, None
                try:
                    async for piece in observed(completion.generation, request.model):
                        runs()
                        reply = _reply(piece, tokenizer, completion)
                        if effective is None:
                            effective = _effective(loaded, completion, options, prompt, replica_id=self._id)
                            reply.effective.CopyFrom(effective)
                        yield reply
                finally:
                    loaded.model.runtime.cancel(completion.generation)

    async def Score(self, request: pb.ScoreRequest, context: RpcContext) -> pb.ScoreResponse:
        with self._load.request(demand_of("", request).tokens):
            async with self._models.use(check_digest(request.model)) as loaded:
                prompt = await _encode(loaded.model.language, request)
                scoring = loaded.model.score(prompt)
                try:
                    return pb.ScoreResponse(ids=prompt.ids, logprobs=await scoring.result())
                finally:
                    loaded.model.runtime.cancel(scoring)

    async def Probe(self, request: pb.ProbeRequest, context: RpcContext) -> pb.ProbeResponse:
        run = await self._library.probe(check_digest(request.model))
        return pb.ProbeResponse(
            results=[_probe_result(result) for result in run.results],
            engine_digest=run.engine_digest,
            load_s=run.load_s,
            stopped_share=stopped_share(run.results),
        )

    async def Load(self, request: pb.LoadRequest, context: RpcContext) -> pb.LoadResponse:
        return pb.LoadResponse(model=_model(await self._models.load(check_digest(request.model))))

    async def Unload(self, request: pb.UnloadRequest, context: RpcContext) -> pb.UnloadResponse:
        await self._models.unload(check_digest(request.model))
        return pb.UnloadResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: RpcContext) -> pb.ListModelsResponse:
        entries = (entry for entry in self._models.list() if request.model in ("", entry.digest))
        return pb.ListModelsResponse(models=[_model(entry) for entry in entries])

    async def Tokenize(self, request: pb.TokenizeRequest, context: RpcContext) -> pb.TokenizeResponse:
        async with self._models.use(check_digest(request.model)) as loaded:
            prompt = await _encode(loaded.model.language, request)
            return pb.TokenizeResponse(ids=prompt.ids, text=prompt.text)

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: RpcContext) -> AsyncIterator[pb.WatchLoadResponse]:
        async for report in self._load.reports():
            yield pb.WatchLoadResponse(
                waiting=report.waiting, running=report.running, tokens=report.tokens, models=sorted(report.models)
            )


async def _encode(language: Language, request: Any) -> Prompt:
    """The prompt of a request; what may take long, or is somebody's template, runs in a thread."""
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        return language.check_ids(request.tokens.ids)
    if kind == "chat":
        messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
        return await asyncio.to_thread(language.encode_chat, messages)
    if kind == "text":
        if len(request.text) <= limits.INLINE_TEXT_MAX_CHARS:
            return language.encode_text(request.text)
        return await asyncio.to_thread(language.encode_text, request.text)
    raise BadRequest("the request has no prompt; set text, chat or tokens")


def _options(request: pb.GenerateRequest) -> GenerateOptions:
    asked = request.sampling
    fields = {field.name: value for field, value in asked.ListFields()}
    return GenerateOptions(
        sampling=SamplingParams(**fields),
        max_tokens=request.max_tokens,
        stop=tuple(request.stop),
        logprobs=request.logprobs if request.HasField("logprobs") else -1,
        truncate_prompt=request.truncate_prompt,
        ignore_stop=request.ignore_stop,
        final_only=request.final_only,
    )


def _effective(
    loaded: Loaded, completion: Completion, options: GenerateOptions, prompt: Prompt, *, replica_id: str
) -> pb.Effective:
    info = loaded.model.info
    return pb.Effective(
        model=loaded.described.digest,
        engine=info.name,
        engine_digest=info.digest,
        device=info.device,
        dtype=loaded.described.scheme,
        sampling=pb.Sampling(**options.sampling.to_dict()),
        max_tokens=completion.max_tokens,
        stop_ids=completion.stop_ids,
        prompt_tokens=completion.prompt_tokens,
        cached_tokens=completion.generation.sequence.cached,
        dropped_tokens=completion.dropped_tokens,
        warnings=prompt.warnings,
        load_id=loaded.id,
        replica_id=replica_id,
    )


def _reply(piece: Piece, tokenizer: Tokenizer, completion: Completion) -> pb.GenerateResponse:
    reply = pb.GenerateResponse(text=piece.text, ids=piece.ids)
    if piece.details:
        reply.details.extend(_detail(detail, tokenizer) for detail in piece.details)
    if piece.finish is not None:
        reply.finish_reason = _FINISH[piece.finish]
        reply.completion_tokens = completion.generation.stream.count
    return reply


def _detail(detail: Detail, tokenizer: Tokenizer) -> pb.TokenDetail:
    return pb.TokenDetail(
        token=_logprob(detail.id, detail.logprob, tokenizer),
        top=[_logprob(id, logprob, tokenizer) for id, logprob in detail.top],
    )


def _logprob(id: int, logprob: float, tokenizer: Tokenizer) -> pb.TokenLogprob:
    text = tokenizer.token_bytes(id).decode("utf-8", errors="replace")
    return pb.TokenLogprob(id=id, logprob=logprob, text=text)


def _probe_result(result: ProbeResult) -> pb.ProbeResult:
    finish = _FINISH[result.finish]
    return pb.ProbeResult(prompt=result.prompt, ids=result.ids, text=result.text, finish_reason=finish)


def _model(entry: Entry) -> pb.Model:
    model = pb.Model(
        digest=entry.digest,
        state=_STATE[entry.state],
        memory_bytes=entry.memory_bytes,
        error=entry.error.message if entry.error else "",
    )
    if entry.loaded is not None:
        info, runtime = entry.loaded.model.info, entry.loaded.model.runtime
        model.engine, model.engine_digest = info.name, info.digest
        model.context_tokens, model.slots = entry.loaded.model.context_tokens, info.slots
        model.running, model.waiting = runtime.running, runtime.waiting
    return model
