"""The inference service as the harness sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from services.evaluator.ports import Completion, Engine, Generation
from services.evaluator.prompts import Prompt
from smeltkit import limits
from smeltkit.errors import ServiceUnavailable
from smeltkit.rpc.channel import call, stream

_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class InferenceClient:
    """Speaks to InferenceService over `channel`, which whoever opened it closes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    async def load(self, bundle: str) -> Engine:
        """The engine that serves `bundle`, once it is ready."""
        request = pb.LoadRequest(model=bundle)
        reply = await call(self._stub.Load, request, timeout_s=limits.EVALUATION_LOAD_TIMEOUT_S)
        return _to_engine(reply.model)

    async def loaded(self, bundle: str) -> Engine | None:
        """The engine that serves `bundle` already, None if it is not loaded."""
        request = pb.ListModelsRequest(model=bundle)
        reply = await call(self._stub.ListModels, request, timeout_s=limits.CALL_TIMEOUT_DEFAULT_S)
        ready = (model for model in reply.models if model.digest == bundle and model.state == pb.MODEL_STATE_READY)
        return next((_to_engine(model) for model in ready), None)

    async def generate(self, generation: Generation) -> Completion:
        """One completion, to its end; Timeout after `generation.timeout_s`."""
        request = pb.GenerateRequest(
            model=generation.bundle,
            max_tokens=generation.max_tokens,
            stop=generation.stop,
            sampling=pb.Sampling(
                temperature=generation.temperature,
                top_k=0,
                top_p=generation.top_p,
                min_p=0,
                repetition_penalty=1,
                seed=generation.seed,
            ),
            request_id=f"{generation.problem}-{generation.sample}",
            final_only=True,
            **_prompt_field(generation.prompt),
        )
        effective, texts, last = pb.Effective(), [], pb.GenerateResponse()
        async with stream(self._stub.Generate, request, timeout_s=generation.timeout_s) as replies:
            async for reply in replies:
                if reply.HasField("effective"):
                    effective = reply.effective
                texts.append(reply.text)
                last = reply
        if last.finish_reason not in _FINISH:
            raise ServiceUnavailable("the inference service ended a completion before it was done; try again")
        return Completion(
            text="".join(texts),
            finish_reason=_FINISH[last.finish_reason],
            prompt_tokens=effective.prompt_tokens,
            completion_tokens=last.completion_tokens,
            effective=_to_settings(effective),
            engine=_to_facts(effective),
            load_id=effective.load_id,
            replica_id=effective.replica_id,
        )

    async def encode(self, bundle: str, text: str) -> list[int]:
        """Token ids of raw text, as generation would use them."""
        request = pb.TokenizeRequest(model=bundle, text=text)
        return list((await call(self._stub.Tokenize, request, timeout_s=limits.EVALUATION_FIRST_TOKEN_S)).ids)

    async def score(self, bundle: str, ids: Sequence[int]) -> list[float]:
        """Natural log-probability of each token given those before it; 0 for the first."""
        request = pb.ScoreRequest(model=bundle, tokens=pb.TokenPrompt(ids=ids))
        timeout_s = limits.EVALUATION_FIRST_TOKEN_S + limits.EVALUATION_TOKEN_S * len(ids)
        return list((await call(self._stub.Score, request, timeout_s=timeout_s)).logprobs)

    async def count_tokens(self, generation: Generation) -> int:
        """Tokens of the prompt, as generation would use it."""
        request = pb.TokenizeRequest(model=generation.bundle, **_prompt_field(generation.prompt))
        reply = await call(self._stub.Tokenize, request, timeout_s=limits.CALL_TIMEOUT_DEFAULT_S)
        return len(reply.ids)


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    if not prompt.is_chat:
        return {"text": prompt.content}
    return {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content=prompt.content)])}


def _to_engine(model: pb.Model) -> Engine:
    return Engine(name=model.engine, digest=model.engine_digest, context_tokens=model.context_tokens, slots=model.slots)


def _to_settings(effective: pb.Effective) -> dict[str, Any]:
    sampling = effective.sampling
    return {
        "model": effective.model,
        "max_tokens": effective.max_tokens,
        "temperature": round(sampling.temperature, 6),
        "top_p": round(sampling.top_p, 6),
        "top_k": sampling.top_k,
        "min_p": round(sampling.min_p, 6),
        "repetition_penalty": round(sampling.repetition_penalty, 6),
        "seed": sampling.seed,
        "dropped_tokens": effective.dropped_tokens,
    }


def _to_facts(effective: pb.Effective) -> dict[str, Any]:
    return {
        "name": effective.engine,
        "digest": effective.engine_digest,
        "device": effective.device,
        "dtype": effective.dtype,
        "stop_ids": list(effective.stop_ids),
        "warnings": list(effective.warnings),
    }
