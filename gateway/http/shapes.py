"""A completion in the two shapes of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from smelt.inference.v1 import inference_pb2

from gateway.http import replies
from smeltkit.ids import new_id

_FINISH: dict[int, replies.FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(kw_only=True)
class Part:
    """A piece of a completion, or all of it: what was added, and the end if it is reached."""

    text: str = ""
    details: list[inference_pb2.TokenDetail] = field(default_factory=list)
    finish: replies.FinishReason | None = None
    offset: int = 0
    """Characters of text before this piece."""

    def add(self, reply: inference_pb2.GenerateResponse) -> None:
        """Puts what `reply` brings behind this piece."""
        self.text += reply.text
        self.details += reply.details
        self.finish = _FINISH.get(reply.finish_reason)


class Shape(Protocol):
    """How one kind of completion looks. Made for one request."""

    def first(self) -> replies.ChatChunk | None:
        """What opens a stream, if anything."""

    def chunk(self, part: Part) -> replies.ChatChunk | replies.TextCompletion:
        """An event of the stream that brings `part`."""

    def whole(self, part: Part) -> replies.ChatCompletion | replies.TextCompletion:
        """The answer that is all of `part`."""

    def usage_only(self) -> replies.ChatChunk | replies.TextCompletion:
        """An event without choices, to carry the usage."""


class ChatShape:
    """`chat.completion` and its chunks."""

    def __init__(self, model: str, wants_logprobs: bool) -> None:
        self._id, self._created, self._model = new_id("chatcmpl"), int(time.time()), model
        self._wants_logprobs = wants_logprobs

    def first(self) -> replies.ChatChunk:
        """The chunk that names the role."""
        return self._chunk([self._choice(replies.Delta(role="assistant", content=""), None, None)])

    def chunk(self, part: Part) -> replies.ChatChunk:
        """A chunk with new text; the one that ends the answer may have none."""
        delta = replies.Delta(content=part.text) if part.text or not part.finish else replies.Delta()
        return self._chunk([self._choice(delta, self._logprobs(part), part.finish)])

    def whole(self, part: Part) -> replies.ChatCompletion:
        """The answer as one message."""
        assert part.finish is not None
        message = replies.AssistantMessage(role="assistant", content=part.text)
        choice = replies.ChatChoice(index=0, message=message, logprobs=self._logprobs(part), finish_reason=part.finish)
        return replies.ChatCompletion(
            id=self._id, object="chat.completion", created=self._created, model=self._model, choices=[choice]
        )

    def usage_only(self) -> replies.ChatChunk:
        """A chunk without choices."""
        return self._chunk([])

    def _chunk(self, choices: list[replies.ChatChunkChoice]) -> replies.ChatChunk:
        return replies.ChatChunk(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self._model, choices=choices
        )

    def _choice(
        self, delta: replies.Delta, logprobs: replies.ChatLogprobs | None, finish: replies.FinishReason | None
    ) -> replies.ChatChunkChoice:
        return replies.ChatChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)

    def _logprobs(self, part: Part) -> replies.ChatLogprobs | None:
        if not self._wants_logprobs:
            return None
        return replies.ChatLogprobs(content=[_scores(detail) for detail in part.details])


class TextShape:
    """`text_completion`, whose chunks look like the whole."""

    def __init__(self, model: str, wants_logprobs: bool) -> None:
        self._id, self._created, self._model = new_id("cmpl"), int(time.time()), model
        self._wants_logprobs = wants_logprobs

    def first(self) -> None:
        """Nothing: a text has no role."""

    def chunk(self, part: Part) -> replies.TextCompletion:
        """A completion with the new text only."""
        choice = replies.TextChoice(index=0, text=part.text, logprobs=self._logprobs(part), finish_reason=part.finish)
        return self._completion([choice])

    whole = chunk

    def usage_only(self) -> replies.TextCompletion:
        """A completion without choices."""
        return self._completion([])

    def _completion(self, choices: list[replies.TextChoice]) -> replies.TextCompletion:
        return replies.TextCompletion(
            id=self._id, object="text_completion", created=self._created, model=self._model, choices=choices
        )

    def _logprobs(self, part: Part) -> replies.TextLogprobs | None:
        if not self._wants_logprobs:
            return None
        tokens = [detail.token.text for detail in part.details]
        return replies.TextLogprobs(
            tokens=tokens,
            token_logprobs=[detail.token.logprob for detail in part.details],
            top_logprobs=[{top.text: top.logprob for top in detail.top} for detail in part.details],
            text_offset=_offsets(part.offset, tokens),
        )


def usage_of(effective: inference_pb2.Effective, completion_tokens: int) -> replies.Usage:
    """The tokens of one completion."""
    return replies.Usage(
        prompt_tokens=effective.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=effective.prompt_tokens + completion_tokens,
        prompt_tokens_details=replies.CachedTokens(cached_tokens=effective.cached_tokens),
    )


def used_by(effective: inference_pb2.Effective) -> replies.Used:
    """The effective settings, as the extension object `smelt`."""
    sampling = effective.sampling
    return replies.Used(
        model=effective.model,
        engine=effective.engine,
        engine_digest=effective.engine_digest,
        device=effective.device,
        dtype=effective.dtype,
        max_tokens=effective.max_tokens,
        stop_ids=list(effective.stop_ids),
        dropped_tokens=effective.dropped_tokens,
        warnings=list(effective.warnings),
        sampling=replies.SamplingUsed(
            temperature=_shortest(sampling.temperature),
            top_k=sampling.top_k,
            top_p=_shortest(sampling.top_p),
            min_p=_shortest(sampling.min_p),
            repetition_penalty=_shortest(sampling.repetition_penalty),
            seed=sampling.seed,
        ),
    )


def _scores(detail: inference_pb2.TokenDetail) -> replies.TokenScores:
    chosen = _score(detail.token)
    top = [_score(token) for token in detail.top]
    return replies.TokenScores(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top)


def _score(token: inference_pb2.TokenLogprob) -> replies.TokenScore:
    is_part = "\ufffd" in token.text
    text_bytes = None if is_part else list(token.text.encode())
    return replies.TokenScore(token=token.text, logprob=token.logprob, bytes=text_bytes)


def _offsets(start: int, tokens: Sequence[str]) -> list[int]:
    """Where each token's text begins."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token)
    return offsets


def _shortest(value: float) -> float:
    """A float32 of the wire as the decimal that a person wrote: 0.7, not 0.699999988079071."""
    return float(f"{value:.6g}")
