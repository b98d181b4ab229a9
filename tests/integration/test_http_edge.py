"""The OpenAI-compatible edge, asked by OpenAI's own client and by raw HTTP, before an inference service on gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from edge_fakes import HELLO, MODEL, WORDS, Served, chat, served_edge

from smeltkit.testing.spans import captured_spans
from smeltkit.testing.waiting import eventually

TEXT = "".join(WORDS)


async def test_chat_completion_has_message_finish_reason_usage_and_effective_settings(
    edge: Served, client: openai.AsyncOpenAI
) -> None:
    """R-034, R-037 and R-122: the numbers of the answer are those of the inference service."""
    answer = await client.chat.completions.create(model="ore-11m", messages=HELLO, temperature=0.7, seed=3, top_p=0.9)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 6, 13)
    used = answer.model_extra["smelt"] if answer.model_extra else None
    assert used["sampling"] == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0,
        "repetition_penalty": 1,
        "seed": 3,
    }
    assert (used["model"], used["engine"], used["dtype"], used["warnings"]) == (MODEL, "fake", "Q8_0", [])
    sent = edge.inference.requests[0]
    assert (sent.model, sent.max_tokens, sent.logprobs) == (MODEL, 0, -1)


async def test_streamed_chat_equals_the_whole_one(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="ore-11m", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == len(WORDS)
    assert chunks[-2].model_extra is not None and chunks[-2].model_extra["smelt"]["engine"] == "fake"


async def test_stream_without_usage_has_no_usage_chunk(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="ore-11m", messages=HELLO, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in [chunk async for chunk in stream])


async def test_text_completion_whole_and_streamed(edge: Served, client: openai.AsyncOpenAI) -> None:
    """R-037: raw text to an instruct model is answered, with the warning in the reply."""
    whole = await client.completions.create(model="ore-11m:q8_0", prompt="def f", max_tokens=3, stop=["\n\n"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("".join(WORDS[:3]), "length")
    assert whole.model_extra is not None and "instruct" in whole.model_extra["smelt"]["warnings"][0]
    stream = await client.completions.create(model="ore-11m", prompt="def f", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    sent = edge.inference.requests[0]
    assert (sent.text, sent.max_tokens, list(sent.stop)) == ("def f", 3, ["\n\n"])


@pytest.mark.parametrize("prompt", [[1, 2, 3], [5]])
async def test_prompt_may_be_token_ids(edge: Served, client: openai.AsyncOpenAI, prompt: list[int]) -> None:
    await client.completions.create(model="ore-11m", prompt=prompt)
    assert list(edge.inference.requests[0].tokens.ids) == prompt


async def test_prompt_may_be_a_list_with_one_text(edge: Served, client: openai.AsyncOpenAI) -> None:
    await client.completions.create(model="ore-11m", prompt=["one"])
    assert edge.inference.requests[0].text == "one"


async def test_model_may_be_a_digest_and_content_may_come_in_parts(edge: Served, client: openai.AsyncOpenAI) -> None:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = await client.chat.completions.create(model=MODEL, messages=parts)
    assert answer.model == MODEL
    assert edge.inference.requests[0].chat.messages[0].content == "ab"


async def test_logprobs_of_a_chat_carry_bytes_and_alternatives(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="ore-11m", messages=HELLO, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.token for token in logprobs.content] == list(WORDS)
    assert bytes(logprobs.content[-1].bytes or []).decode() == WORDS[-1]
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * len(WORDS)


async def test_logprobs_of_a_text_carry_offsets_also_in_a_stream(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="ore-11m", prompt="x", logprobs=1)
    assert whole.choices[0].logprobs is not None
    offsets = whole.choices[0].logprobs.text_offset
    assert offsets is not None and [TEXT[at:].startswith(word) for at, word in zip(offsets, WORDS, strict=True)]
    stream = await client.completions.create(model="ore-11m", prompt="x", logprobs=1, stream=True)
    logprobs = [chunk.choices[0].logprobs async for chunk in stream]
    assert [at for one in logprobs if one is not None for at in one.text_offset or []] == offsets


async def test_models_are_listed_and_found_by_name(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["ore-11m", "ore-11m:q8_0"]
    assert (await client.models.retrieve("ore-11m")).id == "ore-11m"
    for name in ("nope", "report"):
        with pytest.raises(openai.NotFoundError) as raised:
            await client.models.retrieve(name)
        assert raised.value.code == "UNKNOWN_MODEL"


@pytest.mark.parametrize(("word", "stream"), [("hang", True), ("hang", False), ("prefill", True), ("prefill", False)])
async def test_client_that_leaves_frees_its_slot_within_a_second(edge: Served, word: str, stream: bool) -> None:
    """Also before the first token, and when nothing is streamed."""
    async with httpx.AsyncClient(base_url=edge.url) as leaving:
        task = asyncio.ensure_future(leaving.post("/v1/chat/completions", json=chat(word, stream=stream)))
        await eventually(lambda: edge.inference.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: edge.inference.running == 0, timeout_s=1.0)


async def test_silence_gets_a_comment_line_before_and_within_the_answer() -> None:
    async with served_edge(keepalive_s=0.1) as edge, httpx.AsyncClient(base_url=edge.url) as http:
        answer = await http.post("/v1/chat/completions", json=chat("pause", stream=True))
        assert answer.text.count(": keep-alive\n\n") >= 2
        assert answer.text.endswith("data: [DONE]\n\n")
        async with http.stream("POST", "/v1/chat/completions", json=chat("prefill", stream=True)) as waiting:
            assert await anext(waiting.aiter_text()) == ": keep-alive\n\n"
        await eventually(lambda: edge.inference.running == 0)


async def test_stream_headers_forbid_caching_and_buffering(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("x", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")


async def test_request_id_of_the_client_is_kept_and_passed_on(edge: Served, http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("x"), headers={"x-request-id": "my-1"})
    assert answer.headers["x-request-id"] == edge.inference.requests[0].request_id == "my-1"
    answer = await http.get("/healthz", headers={"x-request-id": "a b; c"})
    assert answer.headers["x-request-id"].startswith("req-")


async def test_readiness_names_what_is_missing(edge: Served, http: httpx.AsyncClient) -> None:
    assert (await http.get("/v2/health/live")).status_code == 200
    assert (await http.get("/v2/health/ready")).json() == {"status": "ok", "checks": {"bus": True, "inference": True}}
    edge.ready["inference"] = False
    answer = await http.get("/v2/health/ready")
    assert (answer.status_code, answer.json()["checks"]) == (503, {"bus": True, "inference": False})
    assert (await http.get("/v2/health/live")).status_code == 200


async def test_metrics_count_requests_by_route_and_tokens(http: httpx.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=chat("x"))
    await http.post("/v1/chat/completions", json=chat("x", stream=True))
    await http.get("/v1/models/nope")
    await http.get("/v1/anything/at/all")
    lines = (await http.get("/metrics")).text.splitlines()
    assert 'smelt_http_requests_total{route="/v1/chat/completions",status="200"} 2' in lines
    assert 'smelt_http_requests_total{route="/v1/models/{model:path}",status="404"} 1' in lines
    assert 'smelt_http_requests_total{route="other",status="404"} 1' in lines
    assert 'smelt_http_tokens_total{kind="completion"} 12' in lines
    assert 'smelt_http_request_duration_seconds_bucket{route="/v1/chat/completions",le="+Inf"} 2' in lines


async def test_requests_beside_each_other_do_not_mix(client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(client.chat.completions.create(model="ore-11m", messages=HELLO, max_tokens=1 + i % 6) for i in range(24))
    )
    assert [answer.choices[0].message.content for answer in answers] == ["".join(WORDS[: 1 + i % 6]) for i in range(24)]


async def test_trace_of_the_client_reaches_inference_and_5xx_is_a_failed_span(http: httpx.AsyncClient) -> None:
    trace = "0123456789abcdef0123456789abcdef"
    header = {"traceparent": f"00-{trace}-0123456789abcdef-01"}
    with captured_spans() as spans:
        await http.post("/v1/chat/completions", json=chat("x", stream=True), headers=header)
        await http.post("/v1/chat/completions", json=chat("bug"))
    calls = spans.named("smelt.inference.v1.InferenceService/Generate")
    assert [f"{span.context.trace_id:032x}" for span in calls[:2]] == [trace] * 2, "client and server side"
    fine, failed = spans.named("POST /v1/chat/completions")
    assert fine.status.is_ok or fine.status.is_unset
    assert not failed.status.is_ok and failed.attributes is not None
    assert (failed.attributes["error.type"], failed.attributes["http.response.status_code"]) == ("INTERNAL_ERROR", 500)
