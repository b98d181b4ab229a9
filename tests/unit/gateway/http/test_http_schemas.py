"""Request bodies: any bytes give a request or a BadRequest, and every field of OpenAI's that is taken has an effect."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.schemas import ChatRequest, CompletionRequest, parse
from smeltkit.errors import BadRequest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), JSON))
def test_any_chat_body_is_a_request_or_a_bad_request(fields: dict[str, Any]) -> None:
    _parse_any(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


@given(st.dictionaries(st.sampled_from(sorted(CompletionRequest.model_fields)), JSON))
def test_any_text_body_is_a_request_or_a_bad_request(fields: dict[str, Any]) -> None:
    _parse_any(CompletionRequest, {"model": "m", "prompt": "x", **fields})


@given(st.binary(max_size=200))
def test_any_bytes_are_a_bad_request(data: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(ChatRequest, data)


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stop_may_be_a_text_a_list_or_null(stop: Any, stops: list[str]) -> None:
    body = {"model": "m", "prompt": "x", "stop": stop}
    assert parse(CompletionRequest, json.dumps(body).encode()).stop == stops


def test_message_counts_the_other_errors() -> None:
    with pytest.raises(BadRequest, match=r"\(and 2 more\)"):
        parse(CompletionRequest, b'{"prompt": 5, "seed": -1}')


def _parse_any(kind: Any, body: dict[str, Any]) -> None:
    try:
        parsed = parse(kind, json.dumps(body).encode())
    except BadRequest as error:
        assert error.message
    else:
        assert parsed.model
