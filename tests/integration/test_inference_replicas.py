"""Replicas of inference come, drain and die under load; all of them, and the gateway, are real processes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from inference_files import LINEAGE, store_bundle
from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from smeltkit.bus import Bus, topology
from smeltkit.catalog import Catalog
from smeltkit.config import PlatformConfig
from smeltkit.errors import ServiceUnavailable
from smeltkit.manifest import BUNDLE_TYPE
from smeltkit.ml.bundle import Bundle
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import open_channel, stream
from smeltkit.servers import free_ports
from smeltkit.testing.nats import NatsServer
from smeltkit.testing.processes import ServiceProcess
from smeltkit.testing.s3 import S3Server, fresh_store
from smeltkit.testing.tiny_models import write_tiny_model
from smeltkit.testing.waiting import eventually

TOKENS = 32
LONG = 192
STREAMS = 32
SHARE = 8
"""Completions of a replica that show that it takes part."""
NAME = "replicated"


@dataclass(frozen=True)
class Cluster:
    """A stored model and three places for replicas."""

    model: str
    settings: dict[str, str]
    replicas: list[ServiceProcess]

    @property
    def addresses(self) -> str:
        return ",".join(replica.address for replica in self.replicas)


@pytest.fixture(scope="module")
def cluster(nats: NatsServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("replicas")
    store = fresh_store(s3, folder / "uploads")
    write_tiny_model(folder / "model", "qwen3", is_chat=False, max_position_embeddings=2048)
    Bundle.from_folder(folder / "model", lineage=LINEAGE, licence="Apache-2.0").write_parts(folder / "model")
    model = store_bundle(store, folder / "model")

    async def prepare() -> None:
        bus = await Bus.connect(nats.config, name="prepare")
        await topology.apply(bus)
        await Catalog(bus).set(NAME, model, BUNDLE_TYPE, 1)
        await bus.close()

    asyncio.run(prepare())
    settings = _platform(store.config, nats.url)
    own = {"SMELT_INFERENCE_SLOTS": "8", "SMELT_INFERENCE_THREADS": "1"}
    with ExitStack() as stack:
        replicas = []
        for number in range(3):
            log = folder / f"inference-{number}.log"
            cache = {"SMELT_INFERENCE_CACHE_DIR": str(folder / f"cache-{number}")}
            replicas.append(ServiceProcess("inference", {**settings, **own, **cache}, log))
            stack.callback(replicas[-1].kill)
        yield Cluster(model, settings, replicas)


def _platform(config: PlatformConfig, nats_url: str) -> dict[str, str]:
    named = {f"SMELT_PLATFORM_{key.upper()}": str(value) for key, value in asdict(config).items()}
    return named | {"SMELT_PLATFORM_NATS_URL": nats_url}


@dataclass
class Load:
    """Clients that ask one request after the other until they are told to stop."""

    served: Counter[str] = field(default_factory=Counter)
    """Completions by replica, and of the HTTP edge, which does not tell."""
    failures: list[str] = field(default_factory=list)
    is_over: bool = False

    async def repeat(self, ask: Callable[[], Awaitable[tuple[str, int]]]) -> None:
        while not self.is_over:
            try:
                replica, tokens = await ask()
            except Exception as error:
                self.failures.append(repr(error))
                return
            if tokens != TOKENS:
                self.failures.append(f"{tokens} of {TOKENS} tokens")
            self.served[replica] += 1

    async def wait_shares(self, replicas: int) -> set[str]:
        """Returns once so many more replicas than before have taken part, or something failed: their ids."""
        before = Counter(self.served)

        def shares() -> set[str]:
            grown = {name for name in self.served if self.served[name] >= before[name] + SHARE and name != "http"}
            return grown if len(grown) >= replicas else set()

        found = await eventually(lambda: shares() or self.failures, timeout_s=60)
        assert not self.failures, self.failures
        return set(found)


async def by_grpc(stub: Any, model: str, number: int) -> tuple[str, int]:
    request = pb.GenerateRequest(model=model, text=f"Count from {number}", max_tokens=TOKENS, ignore_stop=True)
    replies = [reply async for reply in _replies(stub, request)]
    assert replies[-1].finish_reason == pb.FINISH_REASON_LENGTH
    return replies[0].effective.replica_id, sum(len(reply.ids) for reply in replies)


async def _replies(stub: Any, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    async with stream(stub.Generate, request, timeout_s=120) as replies:
        async for reply in replies:
            yield reply


async def by_http(client: httpx.AsyncClient, number: int) -> tuple[str, int]:
    """The edge cannot ignore stop tokens: a completion that ends by one counts as whole."""
    body = {"model": NAME, "prompt": f"Count from {number}", "max_tokens": TOKENS, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    *_, last, usage = (json.loads(line) for line in lines[:-1])
    has_stopped = last["choices"][0]["finish_reason"] == "stop"
    return "http", TOKENS if has_stopped else usage["usage"]["completion_tokens"]


async def test_from_one_to_three_replicas_and_back_no_stream_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    """Half of the clients come by HTTP, half by gRPC, all through one gateway; each replica takes its share."""
    first, second, third = cluster.replicas
    port = free_ports(1)[0]
    names = {f"SMELT_GATEWAY_{name}_ADDRESS": "127.0.0.1:1" for name in ("IMPORTER", "TRAINER", "EVALUATOR", "SANDBOX")}
    names |= {"SMELT_GATEWAY_INFERENCE_ADDRESS": cluster.addresses, "SMELT_GATEWAY_HTTP_LISTEN": f"127.0.0.1:{port}"}
    gateway = ServiceProcess("gateway", {**cluster.settings, **names}, tmp_path / "gateway.log")
    load = Load()
    try:
        await asyncio.gather(asyncio.to_thread(gateway.start), asyncio.to_thread(first.start))
        async with (
            open_channel(gateway.address, is_retrying=False) as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            half = range(STREAMS // 2)
            clients = [
                asyncio.create_task(load.repeat(lambda n=n: by_grpc(stub, cluster.model, n)))  # type: ignore[misc]
                for n in half
            ]
            clients += [asyncio.create_task(load.repeat(lambda n=n: by_http(client, n))) for n in half]  # type: ignore[misc]
            assert len(await load.wait_shares(1)) == 1
            for replica, count in ((second, 2), (third, 3)):
                await asyncio.to_thread(replica.start)
                assert len(await load.wait_shares(count)) == count
            for replica in (third, first):
                assert await asyncio.to_thread(replica.terminate) == 0
            assert len(await load.wait_shares(1)) == 1
            load.is_over = True
            await asyncio.gather(*clients)
    finally:
        gateway.kill()
    assert not load.failures and load.served["http"] and len(load.served) == 4


async def test_a_replica_killed_at_work_costs_only_the_streams_that_had_begun(cluster: Cluster) -> None:
    """What had no token yet is answered by the other replica; the rest ends with an error that says so."""
    victim, survivor, _ = cluster.replicas
    for replica in (victim, survivor):
        replica.kill()
    await asyncio.gather(*(asyncio.to_thread(replica.start) for replica in (victim, survivor)))
    tokens: list[int] = [0] * STREAMS

    async def ask(stub: Any, number: int) -> pb.FinishReason.ValueType:
        finish = pb.FINISH_REASON_UNSPECIFIED
        request = pb.GenerateRequest(model=cluster.model, text=f"{number}", max_tokens=LONG, ignore_stop=True)
        async for reply in _replies(stub, request):
            tokens[number], finish = reply.completion_tokens or tokens[number] + len(reply.ids), reply.finish_reason
        return finish

    async with open_inference(cluster.addresses) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        known = channel._pool._replicas  # type: ignore[attr-defined]
        await eventually(lambda: sum(replica.is_serving for replica in known.values()) == 2)
        for replica in known.values():
            if replica.is_serving:
                await by_grpc(inference_pb2_grpc.InferenceServiceStub(replica.channel), cluster.model, 0)
        await eventually(lambda: all(replica.has(cluster.model) for replica in known.values() if replica.is_serving))
        asking = [asyncio.create_task(ask(stub, number)) for number in range(STREAMS)]
        await eventually(lambda: sum(count > 0 for count in tokens) >= STREAMS // 2 and known[victim.address].requests)
        hit, begun = known[victim.address].requests, [count > 0 for count in tokens]
        victim.kill()
        ends = await asyncio.gather(*asking, return_exceptions=True)
    broken = [number for number, end in enumerate(ends) if isinstance(end, BaseException)]
    assert {type(ends[number]) for number in broken} == {ServiceUnavailable}
    assert all(tokens[number] for number in broken) and 0 < len(broken) < hit <= STREAMS and sum(begun) < STREAMS
    whole = [number for number in range(STREAMS) if number not in broken]
    assert all(ends[number] == pb.FINISH_REASON_LENGTH and tokens[number] == LONG for number in whole)
