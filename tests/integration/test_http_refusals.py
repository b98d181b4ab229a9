"""What the OpenAI-compatible edge refuses, and how its errors reach a client: by field, by reason, by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from edge_fakes import ABSENT, HELLO, MODEL, Served, chat, served_edge

from gateway.tenants.keys import hash_key


@pytest.mark.parametrize("model", ["nope", ABSENT])
async def test_unknown_model_is_a_typed_error_with_our_reason(client: openai.AsyncOpenAI, model: str) -> None:
    """By name or by digest."""
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model=model, messages=HELLO)
    assert (raised.value.code, raised.value.type) == ("UNKNOWN_MODEL", "not_found_error")
    assert raised.value.param == "model" and "GET /v1/models" in raised.value.message
    assert raised.value.request_id


async def test_full_queue_says_when_to_try_again(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as raised:
        await client.chat.completions.create(
            model="ore-11m", messages=[{"role": "user", "content": "full"}], stream=True
        )
    assert raised.value.code == "TOO_MANY_REQUESTS"
    assert raised.value.response.headers["retry-after"] == "7"


async def test_error_of_the_inference_service_keeps_reason_and_field(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="ore-11m", messages=HELLO, temperature=11)
    assert (raised.value.code, raised.value.param) == ("BAD_SAMPLING", "temperature")


async def test_error_after_the_first_byte_is_an_event_and_the_end(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("die", stream=True))
    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200 and events[0].startswith("data: ")
    kind, data = events[-1].split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "ENGINE_UNAVAILABLE"
    assert "[DONE]" not in answer.text


async def test_error_event_is_an_error_for_the_official_client(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="ore-11m", messages=[{"role": "user", "content": "die"}], stream=True
    )
    with pytest.raises(openai.APIError, match="engine died"):
        [chunk async for chunk in stream]


@pytest.mark.parametrize("stream", [True, False])
async def test_completion_without_finish_reason_is_an_error(http: httpx.AsyncClient, stream: bool) -> None:
    """R-034: a cut answer is never passed off as a whole one."""
    answer = await http.post("/v1/chat/completions", json=chat("forget", stream=stream))
    assert "ENGINE_UNAVAILABLE" in answer.text
    assert answer.status_code == (200 if stream else 503)


async def test_unexpected_error_tells_nothing_of_the_inside(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json=chat("bug"))
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (chat("x", tools=[]), "tools", "not supported"),
        (chat("x", temprature=1), "temprature", "did you mean temperature"),
        (chat("x", n=2), "n", "1"),
        (chat("x", frequency_penalty=0.5), "frequency_penalty", "0"),
        (chat("x", max_tokens=0), "max_tokens", "greater than or equal to 1"),
        (chat("x", max_tokens="5"), "max_tokens", "integer"),
        (chat("x", seed=-1), "seed", "greater than or equal to 0"),
        (chat("x", top_logprobs=2), None, "only with logprobs"),
        (chat("x", logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
        (chat("x", stream_options={"include_usage": True}), None, "only with stream"),
        (chat("x", max_tokens=1, max_completion_tokens=2), None, "differ"),
        (chat("x", stop=["a"] * 17), "stop", "16"),
        ({"model": "ore-11m", "messages": []}, "messages", "at least 1"),
        ({"model": "ore-11m", "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "system"),
        ({"messages": []}, "model", "required"),
        (chat([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content", "parts must be"),
    ],
)
async def test_bad_field_is_refused_by_name(
    edge: Served, http: httpx.AsyncClient, body: dict[str, Any], param: str | None, message: str
) -> None:
    answer = await http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "BAD_REQUEST")
    assert message in error["message"]
    assert param is None or (error["param"] or "").startswith(param)
    assert edge.inference.requests == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"model": NaN}', b"\xff\xfe"])
async def test_body_that_is_no_json_object_is_a_bad_request(http: httpx.AsyncClient, data: bytes) -> None:
    answer = await http.post("/v1/completions", content=data, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [(["a", "b"], "prompt"), ([1, -1], "prompt.ids.1"), ([[1]], "prompt.ids.0"), (5, "prompt.text")],
)
async def test_bad_prompt_is_refused_by_name(http: httpx.AsyncClient, prompt: Any, param: str) -> None:
    answer = await http.post("/v1/completions", json={"model": "ore-11m", "prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_other_content_types_are_refused(http: httpx.AsyncClient) -> None:
    """A web page can send text/plain across origins without asking, but not JSON."""
    answer = await http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


async def test_large_request_is_refused_while_it_arrives() -> None:
    async with served_edge(request_max_bytes=2048) as edge, httpx.AsyncClient(base_url=edge.url) as http:
        answer = await http.post("/v1/chat/completions", json=chat("x" * 4096))
        assert answer.status_code == 400 and "2048 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/nope"),
        ("GET", "/v1/completions"),
        ("POST", "/"),
        ("DELETE", "/v1/models"),
        ("GET", "//v1/models"),
    ],
)
async def test_unknown_address_or_method_has_an_openai_body(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


async def test_keys_let_in_and_keep_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# holders\nalice {hash_key('sk-alice')}\nbob {hash_key('sk-bob')}  # second\n")
    async with served_edge(api_keys_file=str(file)) as edge, httpx.AsyncClient(base_url=edge.url) as http:
        for header, status in [
            ("Bearer sk-bob", 200),
            ("bearer sk-alice", 200),
            ("Bearer sk-eve", 401),
            ("", 401),
            ("Basic sk-alice", 401),
            (f"Bearer {hash_key('sk-alice')}", 401),
        ]:
            answer = await http.get("/v1/models", headers={"authorization": header})
            assert answer.status_code == status, header
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "BAD_API_KEY"
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/healthz")).status_code == 200, "probes have no key"


async def test_a_tenant_gets_its_models_and_its_tokens_and_no_more(tmp_path: Path) -> None:
    """FakeInference reads 7 tokens and generates 6 in each completion: the third is beyond 20."""
    file = tmp_path / "keys"
    file.write_text(f"alice {hash_key('sk')} tokens=20/10000000 models=ore-11m\nbob {hash_key('sk-bob')}\n")
    async with served_edge(api_keys_file=str(file)) as edge, httpx.AsyncClient(base_url=edge.url) as http:
        alice, bob = {"authorization": "Bearer sk"}, {"authorization": "Bearer sk-bob"}

        async def ask(model: str, headers: dict[str, str], is_streamed: bool = False) -> httpx.Response:
            body = {"model": model, "prompt": "x", "stream": is_streamed}
            return await http.post("/v1/completions", json=body, headers=headers)

        listed = (await http.get("/v1/models", headers=alice)).json()["data"]
        assert [model["id"] for model in listed] == ["ore-11m"]
        for answer in (
            await ask("ore-11m:q8_0", alice),
            await ask(MODEL, alice),
            await http.get("/v1/models/ore-11m:q8_0", headers=alice),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"], error["param"]) == (
                403, "permission_error", "KEY_DENIED", "model",
            )  # fmt: skip
        assert not edge.inference.requests, "what is refused costs nothing"
        assert [(await ask("ore-11m", alice, is_streamed)).status_code for is_streamed in (False, True)] == [200, 200]
        refused = await ask("ore-11m", alice)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "QUOTA_USED_UP")
        assert refused.json()["error"]["type"] == "rate_limit_error" and int(refused.headers["retry-after"]) > 1
        assert (await ask("ore-11m", bob)).status_code == 200
        assert (await http.get("/v1/models", headers=alice)).status_code == 200
