"""What the edge answers, in OpenAI's shapes. Fields that were not set are left out; those set to None are null."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """The reply as JSON, without fields that were never set."""
        return self.model_dump_json(exclude_unset=True)


class CachedTokens(_Reply):
    """Where prompt tokens came from."""

    cached_tokens: int = Field(description="Taken from a prefix computed before.")


class Usage(_Reply):
    """Tokens of one completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class SamplingUsed(_Reply):
    """The sampling values in force, defaults filled in."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


class Used(_Reply):
    """What really made the completion: requested is never silently replaced."""

    model: str = Field(description="Digest of the bundle.")
    engine: str
    engine_digest: str
    device: str
    dtype: str
    sampling: SamplingUsed
    max_tokens: int
    stop_ids: list[int]
    dropped_tokens: int = Field(description="Prompt tokens dropped by truncate_prompt.")
    warnings: list[str]


class TokenScore(_Reply):
    """A token and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Its UTF-8 bytes; null where the token is part of a character.")


class TokenScores(TokenScore):
    """A generated token with its alternatives."""

    top_logprobs: list[TokenScore]


class ChatLogprobs(_Reply):
    """Log-probabilities of a chat completion."""

    content: list[TokenScores]


class TextLogprobs(_Reply):
    """Log-probabilities of a text completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(_Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Delta(_Reply):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(_Reply):
    """The one choice of a chat completion."""

    index: Literal[0]
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(_Reply):
    """The one choice of a chunk."""

    index: Literal[0]
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextChoice(_Reply):
    """The one choice of a text completion or of a chunk of it."""

    index: Literal[0]
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class _Completion(_Reply):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None
    system_fingerprint: str = Field(default="", description="Digest of the engine.")
    smelt: Used | None = None


class ChatCompletion(_Completion):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatChunk(_Completion):
    """One event of a streamed chat completion. `smelt` comes with the finish reason, usage in a chunk of its own."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextCompletion(_Completion):
    """Answer of POST /v1/completions, and each event of its stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelInfo(_Reply):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Always 0: a name may point at another bundle at any time.")
    owned_by: str
    digest: str = Field(description="Digest of the bundle.")
    size_bytes: int


class ModelList(_Reply):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelInfo]


class ErrorDetail(_Reply):
    """What went wrong."""

    message: str
    type: str = Field(description="OpenAI's kind of error.")
    param: str | None = Field(description="The field that is wrong, if one is.")
    code: str = Field(description="Stable reason, see reasons.yaml.")


class ErrorBody(_Reply):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class Health(_Reply):
    """Answer of the health addresses."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, bool] = Field(default={}, description="What readiness rests on.")
