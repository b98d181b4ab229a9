"""The checked-in description of the HTTP edge is what the running edge does, and what OpenAI's own types accept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.http import replies
from gateway.http.config import HttpConfig
from gateway.http.openapi import document
from gateway.http.schemas import ChatRequest, CompletionRequest

FILE = Path(__file__).parents[2] / "contracts" / "interface" / "openapi.yaml"
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text())
CHAT = {"model": "ore-11m", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
TEXT = {"model": "ore-11m", "prompt": "x", "logprobs": 1}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def test_checked_in_description_is_up_to_date() -> None:
    assert document() == DOCUMENT, "run make proto"


@pytest.mark.parametrize(
    ("path", "method"), [(path, method) for path in DOCUMENT["paths"] for method in ("get", "post")]
)
async def test_edge_offers_what_is_described_and_nothing_else(http: httpx.AsyncClient, path: str, method: str) -> None:
    answer = await http.request(method, path.replace("{model}", "ore-11m"))
    is_offered = answer.status_code != 404 or answer.json()["error"]["code"] != "UNKNOWN_ROUTE"
    assert is_offered == (method in DOCUMENT["paths"][path])


@pytest.mark.parametrize(
    ("path", "body", "ours", "theirs"),
    [
        ("/v1/chat/completions", CHAT, replies.ChatCompletion, ChatCompletion),
        ("/v1/completions", TEXT, replies.TextCompletion, Completion),
    ],
)
async def test_whole_answer_fits_our_schema_and_openais_type(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], ours: Any, theirs: Any
) -> None:
    answer = (await http.post(path, json=body)).json()
    ours.model_validate(answer)
    theirs.model_validate(answer)


@pytest.mark.parametrize(
    ("path", "body", "ours", "theirs"),
    [
        ("/v1/chat/completions", CHAT, replies.ChatChunk, ChatCompletionChunk),
        ("/v1/completions", TEXT, replies.TextCompletion, None),
    ],
)
async def test_every_event_fits_our_schema_and_openais_type(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], ours: Any, theirs: Any
) -> None:
    """OpenAI's type of a text completion allows no null finish reason, though its own streams hold one."""
    lines = (await http.post(path, json=body | USAGE)).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line not in ("", "data: [DONE]")]
    for event in events:
        ours.model_validate(event)
        if theirs is not None:
            theirs.model_validate(event)
    assert len(events) > 3


async def test_models_and_health_fit_their_schemas(http: httpx.AsyncClient) -> None:
    replies.ModelList.model_validate((await http.get("/v1/models")).json())
    model = (await http.get("/v1/models/ore-11m")).json()
    replies.ModelInfo.model_validate(model)
    Model.model_validate(model)
    replies.Health.model_validate((await http.get("/v2/health/ready")).json())
    replies.ErrorBody.model_validate((await http.get("/v1/nope")).json())


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_request_field_is_described(model: Any) -> None:
    described = DOCUMENT["components"]["schemas"][model.__name__]
    assert set(described["properties"]) == set(model.model_fields)
    assert described["additionalProperties"] is False


def test_every_request_field_and_setting_is_in_the_documentation() -> None:
    text = (FILE.parents[2] / "docs" / "api" / "http.md").read_text()
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    settings = {f"SMELT_HTTP_{field.name.upper()}" for field in dataclasses.fields(HttpConfig)}
    assert [name for name in sorted(fields | settings) if f"`{name}`" not in text] == []
