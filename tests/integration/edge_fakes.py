"""An inference service that says what its prompt tells it to, and the HTTP edge before it, both on real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from smelt.inference.v1 import inference_pb2, inference_pb2_grpc

from gateway.http.app import build_app
from gateway.http.config import HttpConfig
from gateway.tenants.accounts import Accounts
from gateway.tenants.keys import ApiKeys
from smeltkit.bus.subjects import TENANTS_BUCKET
from smeltkit.catalog import Catalog
from smeltkit.errors import BadSampling, EngineUnavailable, TooManyRequests, UnknownArtifact
from smeltkit.ids import digest_bytes
from smeltkit.manifest import BUNDLE_TYPE, REPORT_TYPE
from smeltkit.rpc.channel import open_channel
from smeltkit.rpc.context import RpcContext
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.testing.bus import MemoryBus

MODEL = digest_bytes(b"bundle")
ABSENT = digest_bytes(b"another bundle")
_GRACE_S = 1
WORDS = ("def ", "f", "(x):", "\n\treturn ", "h\u00e9", "\U0001f600")
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def chat(content: str | list[Any], **fields: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": "ore-11m", "messages": [{"role": "user", "content": content}], **fields}


@dataclass
class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Generates WORDS; a prompt that contains one of the words below changes that."""

    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    running: int = 0
    """Requests that hold a slot."""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: RpcContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        prompt = request.text or " ".join(message.content for message in request.chat.messages)
        if "full" in prompt:
            raise TooManyRequests("the queue is full; try again later", retry_after_s=6.2)
        if request.model == ABSENT:
            raise UnknownArtifact(f"{ABSENT} is not stored")
        if request.sampling.temperature > 10:
            raise BadSampling("temperature=11 is out of range; allowed: 0 to 10", details={"field": "temperature"})
        if "bug" in prompt:
            raise ZeroDivisionError("a secret of the inside")
        self.running += 1
        try:
            if "prefill" in prompt:
                await asyncio.sleep(3600)
            yield inference_pb2.GenerateResponse(effective=_effective(request))
            async for reply in self._words(request, prompt):
                yield reply
        finally:
            self.running -= 1

    async def _words(
        self, request: inference_pb2.GenerateRequest, prompt: str
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        limit = request.max_tokens or 100
        for number, word in enumerate(WORDS[:limit], start=1):
            if number == 3 and "hang" in prompt:
                await asyncio.sleep(3600)
            if number == 3 and "pause" in prompt:
                await asyncio.sleep(0.5)
            if number == 3 and "die" in prompt:
                raise EngineUnavailable("the engine died")
            reply = inference_pb2.GenerateResponse(text=word, ids=[number], completion_tokens=number)
            if request.logprobs >= 0:
                token = inference_pb2.TokenLogprob(id=number, logprob=-0.5, text=word)
                reply.details.append(inference_pb2.TokenDetail(token=token, top=[token] * request.logprobs))
            yield reply
        if "forget" in prompt:
            return
        is_cut = limit <= len(WORDS)
        reason = inference_pb2.FINISH_REASON_LENGTH if is_cut else inference_pb2.FINISH_REASON_STOP
        yield inference_pb2.GenerateResponse(finish_reason=reason, completion_tokens=min(limit, len(WORDS)))


def _effective(request: inference_pb2.GenerateRequest) -> inference_pb2.Effective:
    sampling = inference_pb2.Sampling(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=0)
    sampling.MergeFrom(request.sampling)
    warnings = [] if request.HasField("chat") else ["an instruct model was given raw text"]
    return inference_pb2.Effective(
        model=request.model, engine="fake", engine_digest="sha256:engine", device="cpu", dtype="Q8_0",
        sampling=sampling, max_tokens=request.max_tokens or 100, stop_ids=[8186, 8188], prompt_tokens=7,
        cached_tokens=3, warnings=warnings,
    )  # fmt: skip


@dataclass
class Served:
    """A running edge."""

    url: str
    inference: FakeInference
    ready: dict[str, bool]
    """What the readiness checks answer; tests change it."""


@asynccontextmanager
async def served_edge(**settings: object) -> AsyncIterator[Served]:
    """The edge on uvicorn before a fake inference service on gRPC; `settings` are those of HttpConfig.

    Both servers end however the block is left, also if a request of it still hangs.
    """
    fake, ready = FakeInference(), {"bus": True, "inference": True}
    host = ServiceHost("inference", RpcConfig(drain_grace_s=_GRACE_S))
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    host.add("smelt.inference.v1.InferenceService", add, fake)
    host.set_ready(True)
    await host.start()
    catalog, config = Catalog(bus := MemoryBus()), HttpConfig(**settings)  # type: ignore[arg-type]
    await catalog.set("ore-11m", MODEL, BUNDLE_TYPE, 123)
    await catalog.set("ore-11m:q8_0", MODEL, BUNDLE_TYPE, 45)
    await catalog.set("report", digest_bytes(b"report"), REPORT_TYPE, 6)

    async def is_ready(name: str) -> bool:
        return ready[name]

    async with AsyncExitStack() as stack:
        stack.push_async_callback(host.stop)
        channel = await stack.enter_async_context(open_channel(host.address))
        checks = {name: lambda name=name: is_ready(name) for name in ready}
        keys, accounts = ApiKeys.from_file(config.api_keys_file), Accounts(bus.bucket(TENANTS_BUCKET))
        app = build_app(config, catalog, channel, keys=keys, accounts=accounts, checks=checks)
        served = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=_GRACE_S
        )
        server = uvicorn.Server(served)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            try:
                yield Served(url=f"http://127.0.0.1:{listener.getsockname()[1]}", inference=fake, ready=ready)
            finally:
                server.should_exit = True
                await serving
