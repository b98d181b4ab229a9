"""Calls through the routed channel, on real sockets: balance, retry before the first reply, drain, typed ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from smeltkit import limits
from smeltkit.errors import (
    BadConfig,
    Draining,
    EngineUnavailable,
    NoReplica,
    OutOfMemory,
    ServiceUnavailable,
    SmeltError,
    UnknownArtifact,
)
from smeltkit.routing import pool
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import call, stream
from smeltkit.rpc.context import RpcContext
from smeltkit.rpc.server import RpcConfig, ServiceHost
from smeltkit.servers import free_ports
from smeltkit.testing.waiting import eventually

TOKENS = 4


@dataclass
class Fake(inference_pb2_grpc.InferenceServiceServicer):
    """A replica whose completions wait for `gate` before their first token, and then before their last."""

    host: ServiceHost
    models: tuple[str, ...] = ("model",)
    error: SmeltError | None = None
    asked: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    running: int = 0
    state: pb.ModelState = pb.MODEL_STATE_READY
    first: asyncio.Event = field(default_factory=asyncio.Event)
    last: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(self, request: pb.GenerateRequest, context: RpcContext) -> AsyncIterator[pb.GenerateResponse]:
        self.asked.append(request.text)
        if self.error is not None:
            raise self.error
        self.running += 1
        try:
            await self.first.wait()
            for number in range(TOKENS):
                if number == TOKENS - 1:
                    await self.last.wait()
                yield pb.GenerateResponse(text=self.host.address, completion_tokens=number + 1)
        finally:
            self.running -= 1

    async def Tokenize(self, request: pb.TokenizeRequest, context: RpcContext) -> pb.TokenizeResponse:
        if self.error is not None:
            raise self.error
        return pb.TokenizeResponse(text=self.host.address)

    async def Load(self, request: pb.LoadRequest, context: RpcContext) -> pb.LoadResponse:
        if isinstance(self.error, OutOfMemory):
            raise self.error
        self.loads.append(request.model)
        self.models = (*self.models, request.model)
        return pb.LoadResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: RpcContext) -> pb.ListModelsResponse:
        models = [pb.Model(digest=digest, state=self.state, slots=4, running=1) for digest in self.models]
        return pb.ListModelsResponse(models=models)

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: RpcContext) -> AsyncIterator[pb.WatchLoadResponse]:
        while not self.drained.is_set():
            yield pb.WatchLoadResponse(models=self.models)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.drained.wait(), 0.02)


@asynccontextmanager
async def serving(*, address: str = "127.0.0.1:0", is_open: bool = True, grace_s: float = 5.0) -> AsyncIterator[Fake]:
    """A replica; `is_open` ones answer at once."""
    host = ServiceHost("inference", RpcConfig(listen=address, drain_grace_s=grace_s))
    fake = Fake(host)
    if is_open:
        fake.first.set()
        fake.last.set()

    async def drain() -> None:
        fake.drained.set()

    host.on_drain(drain)
    host.add("smelt.inference.v1.InferenceService", inference_pb2_grpc.add_InferenceServiceServicer_to_server, fake)
    host.set_ready(True)
    await host.start()
    try:
        yield fake
    finally:
        await host.stop()


@asynccontextmanager
async def routed(*replicas: Fake) -> AsyncIterator[Any]:
    """A stub that calls whichever of the replicas is best, once all of them are known; they are its `known`."""
    async with open_inference(",".join(replica.host.address for replica in replicas)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        known = channel._pool._replicas  # type: ignore[attr-defined]
        await eventually(lambda: all(replica.is_serving for replica in known.values()))
        stub.known = known  # type: ignore[attr-defined]
        yield stub


async def generate(stub: Any, text: str = "x", begun: set[str] | None = None) -> list[str]:
    """The replica's address with each reply; `begun` gets `text` with the first."""
    request, found = pb.GenerateRequest(model="model", text=text, max_tokens=TOKENS), []
    async with stream(stub.Generate, request, timeout_s=20) as replies:
        async for reply in replies:
            found.append(reply.text)
            if begun is not None:
                begun.add(text)
    return found


async def test_requests_at_once_are_spread_evenly() -> None:
    async with serving(is_open=False) as one, serving(is_open=False) as two, routed(one, two) as stub:
        tasks = [asyncio.create_task(generate(stub, str(number))) for number in range(10)]
        await eventually(lambda: one.running + two.running == 10)
        assert (one.running, two.running) == (5, 5)
        for replica in (one, two):
            replica.first.set()
            replica.last.set()
        assert [len(replies) for replies in await asyncio.gather(*tasks)] == [TOKENS] * len(tasks)


async def test_a_call_that_breaks_before_its_first_reply_is_made_once_more_elsewhere() -> None:
    """Whether the replica says so itself (its model is being unloaded) or is simply gone."""
    async with serving() as well, AsyncExitStack() as stack:
        ill = await stack.enter_async_context(serving(is_open=False, grace_s=0.0))
        async with routed(ill, well) as stub:
            ill.error = Draining("it is being unloaded", retry_after_s=1.0)
            for number in range(20):
                assert set(await generate(stub, f"{number:03}" * 100)) == {well.host.address}
            assert ill.asked, "some of them met the replica that refuses"
            assert (await call(stub.Tokenize, pb.TokenizeRequest(model="model"), timeout_s=20)).text
            ill.error = None
            tasks = [asyncio.create_task(generate(stub, f"{number} again")) for number in range(8)]
            await eventually(lambda: ill.running > 0)
            await stack.aclose()
            for task in tasks:
                assert set(await task) == {well.host.address}


async def test_a_call_that_began_to_answer_is_not_repeated_and_ends_with_a_typed_error() -> None:
    async with serving() as well, AsyncExitStack() as stack:
        ill = await stack.enter_async_context(serving(is_open=False, grace_s=0.0))
        async with routed(ill, well) as stub:
            begun: set[str] = set()
            tasks = [asyncio.create_task(generate(stub, str(number), begun)) for number in range(6)]
            await eventually(lambda: len(ill.asked + well.asked) == 6)
            count = ill.running
            ill.first.set()
            await eventually(lambda: len(begun) == 6)
            await stack.aclose()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            broken = [end for end in ends if isinstance(end, BaseException)]
            assert len(broken) == count > 0 and {type(error) for error in broken} == {ServiceUnavailable}
            assert len(well.asked) == 6 - count


async def test_errors_that_are_not_about_the_replica_are_not_repeated() -> None:
    async with serving() as one, serving() as two, routed(one, two) as stub:
        one.error = two.error = UnknownArtifact("not stored")
        with pytest.raises(UnknownArtifact):
            await generate(stub)
        assert len(one.asked + two.asked) == 1


async def test_an_error_of_the_only_replica_is_its_own() -> None:
    async with serving() as one, routed(one) as stub:
        one.error = EngineUnavailable("it failed")
        with pytest.raises(EngineUnavailable, match="it failed"):
            await generate(stub)
        assert len(one.asked) == 1


async def test_a_replica_that_drains_gets_nothing_new_and_ends_what_it_has() -> None:
    async with serving(is_open=False) as old, serving() as new, routed(old, new) as stub:
        tasks = [asyncio.create_task(generate(stub, str(number))) for number in range(4)]
        await eventually(lambda: len(old.asked + new.asked) == 4)
        old.first.set()
        count, stopping = old.running, asyncio.create_task(old.host.stop())
        await eventually(lambda: not stub.known[old.host.address].is_serving)
        for number in range(6):
            assert set(await generate(stub, f"later {number}")) == {new.host.address}
        assert (old.running, len(old.asked)) == (count, count)
        old.last.set()
        assert [len(replies) for replies in await asyncio.gather(*tasks)] == [TOKENS] * len(tasks)
        await stopping


async def test_a_replica_without_the_model_is_told_to_load_it_and_then_takes_its_share() -> None:
    async with serving(is_open=False) as warm, serving() as cold:
        cold.models = ()
        async with routed(warm, cold) as stub:
            prompt = "x" * 4 * limits.ROUTE_WARM_TOKENS
            waiting = [asyncio.create_task(generate(stub, prompt + str(number))) for number in range(3)]
            await eventually(lambda: warm.running == 3 and cold.loads)
            assert cold.loads == ["model"]
            await eventually(lambda: stub.known[cold.host.address].has("model"))
            assert set(await generate(stub, "y")) == {cold.host.address}
            warm.first.set()
            warm.last.set()
            await asyncio.gather(*waiting)


async def test_no_replica_left_says_what_each_of_them_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROUTE_WAIT_S", 0.1)
    async with open_inference("127.0.0.1:1") as channel:
        with pytest.raises(NoReplica, match=r"127\.0\.0\.1:1 does not answer.*start one"):
            await generate(inference_pb2_grpc.InferenceServiceStub(channel))


async def test_a_replica_that_comes_back_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROUTE_WAIT_S", 0.1)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with open_inference(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for _ in range(2):
            async with serving(address=address):
                await eventually(lambda: channel._pool._replicas[address].is_serving)  # type: ignore[attr-defined]
                assert len(await generate(stub)) == TOKENS
            with pytest.raises(NoReplica):
                await generate(stub)


async def test_where_none_runs_a_request_waits_for_one_to_be_started_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A probe of health does not: it asks for no model, and must not wake anybody."""
    monkeypatch.setattr(limits, "ROUTE_WAIT_S", 0.1)
    levels: list[int] = []
    monkeypatch.setattr(pool, "gauge", lambda metric: SimpleNamespace(add=levels.append))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with open_inference(address, start_s=60) as channel:
        asking = asyncio.create_task(generate(inference_pb2_grpc.InferenceServiceStub(channel)))
        with pytest.raises(NoReplica):
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert sum(levels) == 1 and not asking.done()
        async with serving(address=address):
            assert await asking == [address] * TOKENS
    assert sum(levels) == 0


async def test_names_are_looked_up_again_and_what_they_no_longer_mean_ends_in_peace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a headless service does: its name means the ready pods of the moment."""
    monkeypatch.setattr(limits, "ROUTE_RESOLVE_PERIOD_S", 0.02)
    meant: list[str] = []

    async def lookup(host: str, port: int) -> list[str]:
        if not meant:
            raise OSError("no such name")
        return list(meant)

    monkeypatch.setattr(pool, "_lookup", lookup)
    async with serving(is_open=False) as one, serving() as two:
        meant.append(one.host.address)
        async with open_inference("dns:///inference.smelt.svc:50051") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            first = asyncio.create_task(generate(stub))
            await eventually(lambda: one.running == 1)
            meant[:] = [two.host.address]
            await eventually(lambda: list(channel._pool._replicas) == meant)  # type: ignore[attr-defined]
            assert set(await generate(stub)) == {two.host.address}
            meant.clear()
            assert set(await generate(stub)) == {two.host.address}
            one.first.set()
            one.last.set()
            assert await first == [one.host.address] * TOKENS


async def test_what_the_operator_wants_loaded_goes_to_every_replica_that_has_room() -> None:
    """A worker's wish goes to one. Only where nobody could is the reply an error."""
    async with serving() as one, serving() as two, serving() as full:
        replicas = (one, two, full)
        addresses = ",".join(replica.host.address for replica in replicas)
        async with routed(*replicas) as stub:
            await call(stub.Load, pb.LoadRequest(model="other"), timeout_s=20)
        assert sum(len(replica.loads) for replica in replicas) == 1
        full.error = OutOfMemory("no room")
        async with open_inference(addresses, is_for_operator=True) as channel:
            known = channel._pool._replicas  # type: ignore[attr-defined]
            await eventually(lambda: all(replica.is_serving for replica in known.values()))
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            await call(stub.Load, pb.LoadRequest(model="everywhere"), timeout_s=20)
            assert one.loads[-1] == two.loads[-1] == "everywhere" and "everywhere" not in full.loads
            one.error = two.error = full.error
            with pytest.raises(OutOfMemory, match="no room"):
                await call(stub.Load, pb.LoadRequest(model="nowhere"), timeout_s=20)


@pytest.mark.parametrize("is_forwarded", [False, True])
async def test_the_operator_sees_the_models_of_every_replica(is_forwarded: bool) -> None:
    """Each once, also where the gateway passes the bytes on: the ready ones' slots together, a failed one nowhere."""
    async with serving() as one, serving() as two, serving() as broken:
        replicas = (one, two, broken)
        one.models, two.models, broken.models = ("model", "one"), ("model", "two"), ("model", "broken")
        broken.state = pb.MODEL_STATE_FAILED
        addresses = ",".join(replica.host.address for replica in replicas)
        async with open_inference(addresses, is_for_operator=True) as channel:
            known = channel._pool._replicas  # type: ignore[attr-defined]
            await eventually(lambda: all(replica.is_serving for replica in known.values()))
            if is_forwarded:
                ask = channel.unary_stream("/smelt.inference.v1.InferenceService/ListModels")
                (reply,) = [pb.ListModelsResponse.FromString(found) async for found in ask(b"", timeout=20)]
            else:
                stub = inference_pb2_grpc.InferenceServiceStub(channel)
                reply = await call(stub.ListModels, pb.ListModelsRequest(), timeout_s=20)
    found = {model.digest: (model.state, model.slots, model.running) for model in reply.models}
    ready, failed = pb.MODEL_STATE_READY, pb.MODEL_STATE_FAILED
    assert found == {"broken": (failed, 4, 1), "model": (ready, 8, 2), "one": (ready, 4, 1), "two": (ready, 4, 1)}


async def test_leaving_a_stream_frees_its_place() -> None:
    async with serving(is_open=False) as one, routed(one) as stub:
        one.first.set()
        async with stream(stub.Generate, pb.GenerateRequest(model="model", text="x"), timeout_s=20) as replies:
            await anext(replies)
        await eventually(lambda: one.running == 0)


@pytest.mark.parametrize("addresses", ["", "nowhere", "a:1,,b:2", "a:0", "a:65536", "a:x"])
async def test_malformed_addresses_are_refused(addresses: str) -> None:
    with pytest.raises(BadConfig, match="host:port"):
        async with open_inference(addresses):
            pass
