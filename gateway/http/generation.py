"""Completions: a request of the edge becomes a call of the inference service, its replies become the answer.

Whoever leaves frees its slot: the call is cancelled the moment the connection is gone, wherever the answer stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from smelt.inference.v1 import inference_pb2, inference_pb2_grpc
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.http import errors
from gateway.http.config import HttpConfig
from gateway.http.metrics import Metrics
from gateway.http.replies import ChatChunk, TextCompletion
from gateway.http.schemas import ChatRequest, CompletionRequest, GenerationRequest, parse
from gateway.http.shapes import ChatShape, Part, Shape, TextShape, usage_of, used_by
from gateway.http.streaming import until_gone, with_pauses
from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import GPU, TOKENS, Tenant
from smeltkit import telemetry
from smeltkit.errors import (
    BadRequest,
    EngineUnavailable,
    InternalError,
    InvalidInput,
    SmeltError,
    UnknownArtifact,
    UnknownModel,
)
from smeltkit.rpc.channel import stream
from smeltkit.telemetry import names

_LOG = logging.getLogger(__name__)
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


class Resolver(Protocol):
    """What is needed of the catalogue here."""

    async def resolve(self, reference: str) -> str:
        """The digest that a name or digest means."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The endpoints of both kinds of completion."""

    catalog: Resolver
    inference: inference_pb2_grpc.InferenceServiceAsyncStub
    config: HttpConfig
    metrics: Metrics
    accounts: Accounts

    async def chat(self, request: Request) -> Exchange:
        """POST /v1/chat/completions."""
        body = parse(ChatRequest, await self._read(request))
        call = await self._to_call(request, body)
        messages = [inference_pb2.ChatMessage(role=message.role, content=message.content) for message in body.messages]
        call.chat.CopyFrom(inference_pb2.ChatPrompt(messages=messages))
        call.max_tokens = body.max_completion_tokens or body.max_tokens or 0
        call.logprobs = (body.top_logprobs or 0) if body.logprobs else -1
        return Exchange(self, call, body, ChatShape(body.model, body.logprobs), request.state.tenant)

    async def complete(self, request: Request) -> Exchange:
        """POST /v1/completions."""
        body = parse(CompletionRequest, await self._read(request))
        call = await self._to_call(request, body)
        if isinstance(body.prompt, str):
            call.text = body.prompt
        else:
            call.tokens.CopyFrom(inference_pb2.TokenPrompt(ids=body.prompt))
        call.max_tokens = body.max_tokens or 0
        call.logprobs = -1 if body.logprobs is None else body.logprobs
        return Exchange(self, call, body, TextShape(body.model, body.logprobs is not None), request.state.tenant)

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(f"content-type is {kind!r}; send the body as JSON with content-type: application/json")
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > self.config.request_max_bytes:
                raise BadRequest(
                    f"the request is larger than {self.config.request_max_bytes} bytes; shorten the prompt"
                )
        return bytes(data)

    async def _digest_of(self, model: str) -> str:
        try:
            return await self.catalog.resolve(model)
        except UnknownModel as error:
            raise unknown_model(model) from error
        except InvalidInput as error:
            raise type(error)(error.message, details={**error.details, "field": "model"}) from error

    async def _to_call(self, request: Request, body: GenerationRequest) -> inference_pb2.GenerateRequest:
        """What both kinds share; values that were not given stay unset. KeyDenied, QuotaUsedUp."""
        tenant: Tenant = request.state.tenant
        tenant.check_model(body.model)
        for resource in (TOKENS, GPU):
            await self.accounts.check(tenant, resource)
        given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        return inference_pb2.GenerateRequest(
            model=await self._digest_of(body.model),
            sampling=inference_pb2.Sampling(**given),
            stop=body.stop,
            request_id=request.state.request_id,
            truncate_prompt=body.truncate_prompt,
            final_only=not body.stream,
        )


def unknown_model(name: str) -> UnknownModel:
    """The error for a client that names a model which is not in the catalogue."""
    return UnknownModel(f"no model is called {name[:200]!r}; GET /v1/models lists them", details={"field": "model"})


class Exchange:
    """The answer to one completion request, as an ASGI application."""

    def __init__(
        self,
        owner: Generation,
        call: inference_pb2.GenerateRequest,
        body: GenerationRequest,
        shape: Shape,
        tenant: Tenant,
    ) -> None:
        self._owner, self._call, self._body, self._shape, self._tenant = owner, call, body, shape, tenant
        self._effective = inference_pb2.Effective()
        self._completion_tokens = 0
        self._finish = inference_pb2.FINISH_REASON_UNSPECIFIED

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun_s = time.monotonic()
        answer = self._stream(send) if self._body.stream else self._send_whole(scope, receive, send)
        try:
            await until_gone(receive, answer)
        finally:
            self._owner.metrics.count_tokens(self._effective.prompt_tokens, self._completion_tokens)
            tokens = self._effective.prompt_tokens + self._completion_tokens
            self._owner.accounts.count(self._tenant, TOKENS, tokens)
            if self._effective.device not in ("", "cpu"):
                self._owner.accounts.count(self._tenant, GPU, time.monotonic() - begun_s)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        part = Part()
        async with self._replies() as replies:
            async for reply in replies:
                part.add(reply)
        self._check_finished()
        answer = self._shape.whole(part)
        answer.usage = usage_of(self._effective, self._completion_tokens)
        answer.smelt, answer.system_fingerprint = used_by(self._effective), self._effective.engine_digest
        await Response(answer.to_json(), media_type="application/json")(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """Errors before the first byte are raised, so that they get their status; later ones are an event."""
        is_started = False
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    if not is_started:
                        await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
                        is_started = True
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        except Exception as error:
            if not is_started:
                raise
            await send({"type": "http.response.body", "body": self._error_event(error).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[str]:
        """The events of the stream as text; a comment when nothing came for a while, also before the first one."""
        offset, has_begun = 0, False
        pause_s = self._owner.config.keepalive_s
        async with self._replies() as replies, aclosing(with_pauses(replies, pause_s)) as watched:
            async for reply in watched:
                if reply is None:
                    yield ": keep-alive\n\n"
                    continue
                if not has_begun and (first := self._shape.first()) is not None:
                    yield self._event(first)
                has_begun = True
                part = Part(offset=offset)
                part.add(reply)
                offset += len(part.text)
                if part.text or part.details or part.finish:
                    yield self._event(self._shape.chunk(part), is_last=part.finish is not None)
        self._check_finished()
        if self._body.includes_usage:
            last = self._shape.usage_only()
            last.usage = usage_of(self._effective, self._completion_tokens)
            yield f"data: {last.to_json()}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, chunk: ChatChunk | TextCompletion, *, is_last: bool = False) -> str:
        if self._body.includes_usage:
            chunk.usage = None
        if is_last:
            chunk.smelt, chunk.system_fingerprint = used_by(self._effective), self._effective.engine_digest
        return f"data: {chunk.to_json()}\n\n"

    @asynccontextmanager
    async def _replies(self) -> AsyncIterator[AsyncIterator[inference_pb2.GenerateResponse]]:
        """The replies of inference, each of them noted; the call is cancelled when the block is left."""
        attributes: dict[str, Any] = {
            names.GEN_AI_OPERATION: "chat" if self._call.HasField("chat") else "text_completion"
        }
        timeout_s = self._owner.config.request_timeout_s
        with telemetry.span("smelt.http.generate", **attributes):
            async with stream(self._owner.inference.Generate, self._call, timeout_s=timeout_s) as replies:
                yield self._noted(replies)

    async def _noted(
        self, replies: AsyncIterator[inference_pb2.GenerateResponse]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            async for reply in replies:
                if reply.HasField("effective"):
                    self._effective = reply.effective
                self._completion_tokens = max(self._completion_tokens, reply.completion_tokens)
                self._finish = self._finish or reply.finish_reason
                yield reply
        except UnknownArtifact as error:
            raise unknown_model(self._body.model) from error

    def _check_finished(self) -> None:
        """Every completion carries a finish reason; one without is an error, not a short answer."""
        if self._finish == inference_pb2.FINISH_REASON_CANCELLED:
            raise EngineUnavailable("the inference service cancelled this completion; try again")
        if self._finish == inference_pb2.FINISH_REASON_UNSPECIFIED:
            raise EngineUnavailable("the inference service ended this completion without a finish reason; try again")

    def _error_event(self, error: Exception) -> str:
        if not isinstance(error, SmeltError):
            _LOG.exception("stream failed", extra={"request_id": self._call.request_id})
            error = InternalError(f"the stream failed; see the gateway's log for {self._call.request_id}")
        return f"event: error\ndata: {errors.to_body(error).to_json()}\n\n"
