"""OpenAI's own client and plain curl on the shipped model: real tokens through the HTTP edge of the real platform."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest
from smelt.inference.v1 import inference_pb2, inference_pb2_grpc

from gateway import stack
from tests.e2e.conftest import Smelt

MODEL = "ore-11m:q8_0"
ASK: list[Any] = [{"role": "user", "content": "Write a function that adds two numbers."}]
ENDLESS = "1, 2, 3, 4, 5,"
"""A text that the model continues until it is stopped."""
LONG_TOKENS = 400
FREED_WITHIN_S = 20


@pytest.fixture(scope="module")
def url(smelt: Smelt) -> str:
    """Address of the HTTP edge."""
    return stack.status(smelt.home).gateway_http


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client; it must not repeat requests here."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def inference(smelt: Smelt) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    """The inference service, as the gateway passes it on."""
    with grpc.insecure_channel(stack.status(smelt.home).gateway_grpc) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def running(inference: inference_pb2_grpc.InferenceServiceStub) -> int:
    """Requests that hold a slot now."""
    return sum(model.running for model in inference.ListModels(inference_pb2.ListModelsRequest(), timeout=10).models)


def wait_free(inference: inference_pb2_grpc.InferenceServiceStub) -> None:
    """Returns once no request holds a slot."""
    end = time.monotonic() + FREED_WITHIN_S
    while count := running(inference):
        assert time.monotonic() < end, f"{count} requests still run"


def generated_tokens(url: str) -> int:
    """Tokens generated for clients of the edge so far."""
    (line,) = (line for line in httpx.get(f"{url}/metrics").text.splitlines() if 'kind="completion"' in line)
    return int(line.split()[-1])


def curl(url: str, path: str, body: dict[str, Any]) -> subprocess.Popen[str]:
    """A running curl that prints the answer as it comes."""
    command = ["curl", "--silent", "--no-buffer", "--max-time", "120", f"{url}{path}", "--data", json.dumps(body)]
    return subprocess.Popen([*command, "--header", "content-type: application/json"], stdout=subprocess.PIPE, text=True)


def test_streamed_chat_of_the_official_client_is_the_whole_answer(client: openai.OpenAI) -> None:
    """R-034, R-037: pieces, the finish reason, the usage, and what really ran."""
    whole = client.chat.completions.create(model=MODEL, messages=ASK)
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and "def " in text
    assert len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert last.usage is not None and whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert chunks[-1].model_extra is not None and chunks[-1].model_extra["smelt"]["dtype"] == "Q8_0"


def test_streamed_completion_of_the_official_client_is_the_whole_answer(client: openai.OpenAI) -> None:
    """A raw text is continued, to the limit of tokens."""
    whole = client.completions.create(model=MODEL, prompt=ENDLESS, max_tokens=24)
    chunks = list(client.completions.create(model=MODEL, prompt=ENDLESS, max_tokens=24, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert whole.usage is not None and whole.usage.completion_tokens == 24


@pytest.mark.parametrize(
    ("path", "prompt"), [("/v1/chat/completions", {"messages": ASK}), ("/v1/completions", {"prompt": ENDLESS})]
)
def test_curl_gets_events_and_the_end(url: str, path: str, prompt: dict[str, Any]) -> None:
    """Every event is one line of JSON, and the last one says that it is the last."""
    with curl(url, path, {"model": MODEL, "stream": True, "max_tokens": 16, **prompt}) as process:
        assert process.stdout is not None
        *events, done = process.stdout.read().strip().split("\n\n")
    assert process.returncode == 0 and done == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    assert choices[-1]["finish_reason"] in ("stop", "length")


def test_clients_that_leave_free_their_slots(
    url: str, client: openai.OpenAI, inference: inference_pb2_grpc.InferenceServiceStub
) -> None:
    """The official client and curl leave in the middle; nothing goes on, and nothing more is generated."""
    whole = client.completions.create(model=MODEL, prompt=ENDLESS, max_tokens=LONG_TOKENS)
    assert whole.choices[0].finish_reason == "length", "the text must be an endless one"
    before = generated_tokens(url)
    with client.completions.create(model=MODEL, prompt=ENDLESS, stream=True) as stream:
        assert next(iter(stream)).choices[0].text
        with curl(url, "/v1/completions", {"model": MODEL, "prompt": ENDLESS, "stream": True}) as process:
            assert process.stdout is not None and process.stdout.readline().startswith("data: ")
            assert running(inference) == 2
            process.terminate()
    wait_free(inference)
    assert generated_tokens(url) - before < 2 * LONG_TOKENS
