"""Numbers and tokens come out as people wrote them."""

from __future__ import annotations

import pytest
from smelt.inference.v1 import inference_pb2

from gateway.http.shapes import ChatShape, Part, TextShape, usage_of, used_by


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 0.95, 1.0, 1.1, 9.99])
def test_float_of_the_wire_is_shown_as_it_was_asked_for(value: float) -> None:
    effective = inference_pb2.Effective(sampling=inference_pb2.Sampling(temperature=value))
    assert used_by(effective).sampling.temperature == value


def test_token_that_is_part_of_a_character_has_no_bytes() -> None:
    token = inference_pb2.TokenLogprob(id=1, logprob=-1, text="\ufffd")
    part = Part(details=[inference_pb2.TokenDetail(token=token)])
    logprobs = ChatShape("m", True).chunk(part).choices[0].logprobs
    assert logprobs is not None and logprobs.content[0].bytes is None


def test_offsets_of_a_stream_continue_where_the_last_piece_ended() -> None:
    tokens = [inference_pb2.TokenDetail(token=inference_pb2.TokenLogprob(text=text)) for text in ("ab", "c")]
    logprobs = TextShape("m", True).chunk(Part(offset=10, details=tokens)).choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset == [10, 12]


def test_usage_counts_prompt_and_completion() -> None:
    usage = usage_of(inference_pb2.Effective(prompt_tokens=5, cached_tokens=2), 7)
    assert (usage.total_tokens, usage.prompt_tokens_details.cached_tokens) == (12, 2)


def test_pieces_add_up() -> None:
    part = Part()
    part.add(inference_pb2.GenerateResponse(text="a"))
    part.add(inference_pb2.GenerateResponse(text="b", finish_reason=inference_pb2.FINISH_REASON_LENGTH))
    assert (part.text, part.finish) == ("ab", "length")
