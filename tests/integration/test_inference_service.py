"""The inference service as a process, on real S3 and NATS: what a client of its gRPC interface can rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from inference_files import SMALL, basic_prompts, complete_folder, f16_file, gguf_folder, q8_file, store_bundle
from smelt.event.v1 import event_pb2
from smelt.inference.v1 import inference_pb2 as pb
from smelt.inference.v1 import inference_pb2_grpc

from smeltkit.blobs.s3 import S3Store
from smeltkit.bus import Bus, topology
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadDigest, BadManifest, BadRequest, BadSampling, PromptTooLong, UnknownArtifact
from smeltkit.manifest import PROBE_TYPE, REPORT_TYPE, Manifest
from smeltkit.rpc.channel import call, open_channel, stream
from smeltkit.testing.nats import NatsServer
from smeltkit.testing.processes import ServiceProcess, service_process
from smeltkit.testing.s3 import S3Server, fresh_store

TIMEOUT_S = 200.0
CHAT = pb.ChatPrompt(
    messages=[pb.ChatMessage(role="user", content="Write a Python function that returns the sum of a list of numbers.")]
)


@dataclass(frozen=True)
class Stored:
    """One model, stored in both formats."""

    platform: PlatformConfig
    safetensors: str
    gguf: str


@pytest.fixture(scope="module")
def stored(nats: NatsServer, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    folder = tmp_path_factory.mktemp("models")
    store = fresh_store(s3, folder / "uploads")
    bundle = complete_folder(SMALL, folder / "ore-11m")
    quantized = gguf_folder(bundle, q8_file(f16_file(bundle)), folder / "ore-11m-q8")

    async def prepare() -> None:
        bus = await Bus.connect(nats.config, name="prepare")
        await topology.apply(bus)
        await bus.close()

    asyncio.run(prepare())
    platform = replace(store.config, nats_url=nats.url)
    return Stored(platform, store_bundle(store, bundle), store_bundle(store, quantized))


@pytest.fixture(scope="module")
def process(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder, platform = tmp_path_factory.mktemp("service"), stored.platform
    settings = {
        "SMELT_PLATFORM_NATS_URL": platform.nats_url,
        "SMELT_PLATFORM_S3_ENDPOINT": platform.s3_endpoint,
        "SMELT_PLATFORM_S3_ACCESS_KEY": platform.s3_access_key,
        "SMELT_PLATFORM_S3_SECRET_KEY": platform.s3_secret_key,
        "SMELT_PLATFORM_S3_BUCKET": platform.s3_bucket,
        "SMELT_INFERENCE_CACHE_DIR": str(folder / "cache"),
        "SMELT_INFERENCE_SLOTS": "4",
        "SMELT_INFERENCE_THREADS": "1",
    }
    with service_process("inference", settings, folder) as running:
        yield running


@pytest.fixture
async def stub(process: ServiceProcess) -> AsyncIterator[Any]:
    async with open_channel(process.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


async def generate(stub: Any, **fields: Any) -> list[pb.GenerateResponse]:
    """All replies of one completion."""
    async with stream(stub.Generate, pb.GenerateRequest(**fields), timeout_s=TIMEOUT_S) as replies:
        return [reply async for reply in replies]


def text(replies: list[pb.GenerateResponse]) -> str:
    return "".join(reply.text for reply in replies)


async def model_of(stub: Any, digest: str) -> pb.Model | None:
    listed = await call(stub.ListModels, pb.ListModelsRequest(model=digest), timeout_s=TIMEOUT_S)
    assert {model.digest for model in listed.models} <= {digest}
    return next(iter(listed.models), None)


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
async def test_every_stored_format_is_served(stub: Any, stored: Stored, format: str) -> None:
    """R-044, R-034: a chat ends by its stop token, and the last reply says so."""
    replies = await generate(stub, model=getattr(stored, format), chat=CHAT)
    assert "def " in text(replies) and "return" in text(replies)
    assert replies[-1].finish_reason == pb.FINISH_REASON_STOP
    assert replies[-1].completion_tokens == sum(len(reply.ids) for reply in replies)
    assert "<|im_end|>" not in text(replies)


async def test_the_first_reply_says_what_is_really_used(stub: Any, stored: Stored) -> None:
    """R-042: engine, device, type of the weights, and every sampling value with its default filled in."""
    replies = await generate(stub, model=stored.gguf, chat=CHAT, max_tokens=7, sampling=pb.Sampling(top_k=40))
    effective = replies[0].effective
    assert (effective.model, effective.engine, effective.device, effective.dtype) == (
        stored.gguf,
        "llama",
        "cpu",
        "Q8_0",
    )
    assert effective.engine_digest.startswith("sha256:")
    assert effective.max_tokens == 7 and list(effective.stop_ids) == [8186, 8188]
    assert {field.name for field, _ in effective.sampling.ListFields()} == set(
        effective.sampling.DESCRIPTOR.fields_by_name
    )
    assert (effective.sampling.top_k, effective.sampling.top_p, effective.sampling.temperature) == (40, 1.0, 0.0)
    assert effective.prompt_tokens > 10 and effective.dropped_tokens == 0
    assert all(not reply.HasField("effective") for reply in replies[1:])


async def test_raw_text_to_an_instruct_model_warns(stub: Any, stored: Stored) -> None:
    """R-037: recorded in the reply; a chat has no warning."""
    raw = await generate(stub, model=stored.gguf, text="def add(a, b):\n", max_tokens=4)
    chat = await generate(stub, model=stored.gguf, chat=CHAT, max_tokens=4)
    assert "chat" in raw[0].effective.warnings[0]
    assert not chat[0].effective.warnings


async def test_a_converted_model_says_that_it_runs_as_f16(stub: Any, stored: Stored) -> None:
    replies = await generate(stub, model=stored.safetensors, text="x = ", max_tokens=1)
    assert replies[0].effective.dtype == "F16"


async def test_a_stop_string_ends_the_text_before_it(stub: Any, stored: Stored) -> None:
    whole = text(await generate(stub, model=stored.gguf, chat=CHAT))
    replies = await generate(stub, model=stored.gguf, chat=CHAT, stop=["return"])
    assert text(replies) == whole[: whole.index("return")]
    assert replies[-1].finish_reason == pb.FINISH_REASON_STOP


async def test_a_repeated_prompt_computes_only_its_last_token(stub: Any, stored: Stored) -> None:
    """In F16: attention computes one row otherwise than many, and rounded to eight bits that may be another token."""
    first = await generate(stub, model=stored.safetensors, text=basic_prompts(9)[8], max_tokens=8)
    again = await generate(stub, model=stored.safetensors, text=basic_prompts(9)[8], max_tokens=8)
    assert again[0].effective.cached_tokens == again[0].effective.prompt_tokens - 1
    assert text(again) == text(first)


async def test_logprobs_come_with_their_text(stub: Any, stored: Stored) -> None:
    replies = await generate(stub, model=stored.gguf, chat=CHAT, max_tokens=5, logprobs=2)
    details = [detail for reply in replies for detail in reply.details]
    assert len(details) == 5
    assert [detail.token.id for detail in details] == [id for reply in replies for id in reply.ids]
    assert all(len(detail.top) == 2 and detail.top[0].logprob >= detail.top[1].logprob for detail in details)
    assert "".join(detail.token.text for detail in details) == text(replies)


async def test_a_client_that_leaves_frees_its_slot(stub: Any, stored: Stored) -> None:
    request = pb.GenerateRequest(model=stored.gguf, text="x = [", max_tokens=1900, ignore_stop=True)
    async with stream(stub.Generate, request, timeout_s=TIMEOUT_S) as replies:
        await anext(replies)
        model = await model_of(stub, stored.gguf)
        assert model is not None and model.running == 1
    for _ in range(100):
        model = await model_of(stub, stored.gguf)
        if model is not None and not model.running:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the slot is still taken")


async def test_more_requests_than_slots_all_complete(stub: Any, stored: Stored) -> None:
    prompts = basic_prompts(12)
    together = await asyncio.gather(
        *(generate(stub, model=stored.gguf, text=prompt, max_tokens=12) for prompt in prompts)
    )
    assert all(replies[-1].finish_reason != pb.FINISH_REASON_UNSPECIFIED for replies in together)
    model = await model_of(stub, stored.gguf)
    assert model is not None and (model.running, model.waiting, model.slots) == (0, 0, 4)


async def test_score_gives_a_logprob_for_each_token(stub: Any, stored: Stored) -> None:
    likely = await call(
        stub.Score, pb.ScoreRequest(model=stored.gguf, text="for i in range(10):\n"), timeout_s=TIMEOUT_S
    )
    odd = await call(
        stub.Score, pb.ScoreRequest(model=stored.gguf, text="for i in range range 10\n"), timeout_s=TIMEOUT_S
    )
    assert len(likely.ids) == len(likely.logprobs) and likely.logprobs[0] == 0
    assert sum(likely.logprobs) / len(likely.ids) > sum(odd.logprobs) / len(odd.ids)


async def test_tokenize_shows_the_rendered_chat(stub: Any, stored: Stored) -> None:
    """R-036: the text that generation sees, byte for byte."""
    reply = await call(stub.Tokenize, pb.TokenizeRequest(model=stored.gguf, chat=CHAT), timeout_s=TIMEOUT_S)
    assert reply.text.startswith("<|im_start|>user\nWrite") and reply.text.endswith("<|im_start|>assistant\n")
    replies = await generate(stub, model=stored.gguf, tokens=pb.TokenPrompt(ids=reply.ids), max_tokens=6)
    assert text(replies) == text(await generate(stub, model=stored.gguf, chat=CHAT, max_tokens=6))


async def test_the_probe_runs_in_a_clean_process_and_is_recorded(stub: Any, stored: Stored, tmp_path: Path) -> None:
    """R-032: the share of prompts that ended by a stop token is told; later loads are held against the record."""
    reply = await call(stub.Probe, pb.ProbeRequest(model=stored.gguf), timeout_s=TIMEOUT_S)
    assert len(reply.results) >= 20 and reply.load_s > 0
    stopped = [result for result in reply.results if result.finish_reason == pb.FINISH_REASON_STOP]
    assert reply.stopped_share == pytest.approx(len(stopped) / len(reply.results))
    assert reply.stopped_share >= 0.8
    store = S3Store(stored.platform, state_folder=tmp_path)
    engine = reply.engine_digest.removeprefix("sha256:")
    record = store.get_ref(f"probes/{stored.gguf.removeprefix('sha256:')}/{engine}")
    assert record is not None
    manifest = store.get_manifest(record)
    assert (manifest.artifact_type, manifest.subject) == (PROBE_TYPE, stored.gguf)
    assert manifest.config["results"][0]["ids"] == list(reply.results[0].ids)


async def test_load_and_unload(stub: Any, stored: Stored) -> None:
    """R-043: a model that is listed as ready repeated its recorded probe."""
    loaded = await call(stub.Load, pb.LoadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
    assert loaded.model.state == pb.MODEL_STATE_READY
    assert loaded.model.memory_bytes > 20_000_000 and loaded.model.context_tokens == 2048
    await call(stub.Unload, pb.UnloadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
    assert await model_of(stub, stored.safetensors) is None


async def test_loading_and_unloading_are_facts_on_the_bus(stub: Any, stored: Stored, nats: NatsServer) -> None:
    """R-011: also that bfloat16 weights run in half precision."""
    bus = await Bus.connect(nats.config, name="listener")
    try:
        before = await bus.jetstream.stream_info("SMELT_EVENTS")
        await call(stub.Load, pb.LoadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
        await call(stub.Unload, pb.UnloadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
        bodies = {}
        for sequence in range(before.state.last_seq + 1, before.state.last_seq + 4):
            for _ in range(500):
                try:
                    message = await bus.jetstream.get_msg("SMELT_EVENTS", sequence)
                    break
                except Exception:
                    await asyncio.sleep(0.02)
            bodies[message.subject] = message.data
        loaded = next(body for subject, body in bodies.items() if ".model.loaded" in str(subject))
        unloaded = next(body for subject, body in bodies.items() if ".model.unloaded" in str(subject))
        assert event_pb2.ModelLoaded.FromString(loaded or b"").digest == stored.safetensors
        fallback = next(body for subject, body in bodies.items() if ".fallback.used" in str(subject))
        assert event_pb2.FallbackUsed.FromString(fallback or b"").requested == "weights in BF16"
        assert event_pb2.ModelUnloaded.FromString(unloaded or b"").cause == "asked"
    finally:
        await bus.close()


async def test_a_broken_probe_record_keeps_the_model_out(stub: Any, stored: Stored, tmp_path: Path) -> None:
    """R-041, R-043: a model that does not repeat its recorded tokens is failed, says why, and takes no request."""
    store = S3Store(stored.platform, state_folder=tmp_path)
    probe = await call(stub.Probe, pb.ProbeRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
    name = f"probes/{stored.safetensors[7:]}/{probe.engine_digest[7:]}"
    record = store.get_ref(name) or ""
    good = store.get_manifest(record)
    results = [{**result, "ids": [1, 2, 3]} for result in good.config["results"]]
    store.put_ref(name, store.put_manifest(replace(good, config={**good.config, "results": results})))
    with pytest.raises(Exception, match="differs from its recorded probe"):
        await generate(stub, model=stored.safetensors, text="x")
    model = await model_of(stub, stored.safetensors)
    assert model is not None and model.state == pb.MODEL_STATE_FAILED and "probe" in model.error
    store.put_ref(name, record)
    loaded = await call(stub.Load, pb.LoadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)
    assert loaded.model.state == pb.MODEL_STATE_READY
    await call(stub.Unload, pb.UnloadRequest(model=stored.safetensors), timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "latest", "text": "x"}, BadDigest),
        ({"model": "sha256:" + "0" * 64, "text": "x"}, UnknownArtifact),
        ({}, BadRequest),
        ({"text": "x", "max_tokens": -1}, BadRequest),
        ({"text": "x", "max_tokens": 2048}, PromptTooLong),
        ({"text": "x " * 3000}, PromptTooLong),
        ({"text": "x", "sampling": pb.Sampling(temperature=-1)}, BadSampling),
        ({"text": "x", "sampling": pb.Sampling(top_p=0)}, BadSampling),
        ({"text": "x", "logprobs": 21}, BadSampling),
        ({"text": "x", "stop": [""]}, BadRequest),
        ({"tokens": pb.TokenPrompt(ids=[999_999])}, BadRequest),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_bad_requests_are_refused_with_their_reason(
    stub: Any, stored: Stored, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await generate(stub, **{"model": stored.gguf, **fields})


async def test_an_artifact_that_is_no_bundle_is_refused(stub: Any, stored: Stored, tmp_path: Path) -> None:
    digest = S3Store(stored.platform, state_folder=tmp_path).put_manifest(Manifest(artifact_type=REPORT_TYPE))
    with pytest.raises(BadManifest, match="not a bundle"):
        await generate(stub, model=digest, text="x")


async def test_truncation_is_counted(stub: Any, stored: Stored) -> None:
    """R-035: only where asked for, and the count comes back."""
    prompt = "value = 1\n" * 700
    replies = await generate(stub, model=stored.gguf, text=prompt, max_tokens=4, truncate_prompt=True)
    effective = replies[0].effective
    assert effective.prompt_tokens == 2044 and effective.dropped_tokens > 0


async def test_after_a_crash_the_service_answers_the_same(process: ServiceProcess, stub: Any, stored: Stored) -> None:
    before = text(await generate(stub, model=stored.gguf, chat=CHAT))
    process.kill()
    process.start()
    async with open_channel(process.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
        fresh = inference_pb2_grpc.InferenceServiceStub(channel)
        assert text(await generate(fresh, model=stored.gguf, chat=CHAT)) == before
