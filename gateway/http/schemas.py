"""What a client may ask of the OpenAI-compatible edge. A field that is not here is refused by name, never ignored.

Fields beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty` and `truncate_prompt`. Ranges of sampling values are
checked where sampling is done, by the inference service; here only what the wire needs.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from smeltkit import limits
from smeltkit.errors import BadRequest

_INT32_MAX = 2**31 - 1
_TOP_LOGPROBS = Field(ge=0, le=limits.TOP_LOGPROBS_MAX)
_TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]
_Zero = Annotated[float, Field(ge=0, le=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = Field(default=False, description="Send one more chunk, without choices, with the usage.")


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _join_parts(value: Any) -> Any:
    """Content in parts as one text."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text" for part in value):
        raise ValueError('parts must be of the form {"type": "text", "text": ...}')
    return "".join(str(part["text"]) for part in value)


def _to_list(value: Any) -> Any:
    """One text, several or none as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _only_one(value: Any) -> Any:
    """A list with one text as that text."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts; send one prompt a request")
        return value[0]
    return value


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart])] = Field(
        description="Text, or parts that are joined."
    )


class GenerationRequest(_Strict):
    """What both kinds of completion share."""

    model: str = Field(min_length=1, max_length=512, description="Name or digest of a bundle.")
    max_tokens: int | None = Field(
        default=None, ge=1, le=_INT32_MAX, description="Most new tokens; by default all that the context holds."
    )
    temperature: float | None = Field(default=None, description="0, the default, is greedy; else 0.01 to 10.")
    top_p: float | None = Field(default=None, description="Above 0 to 1; default 1.")
    top_k: int | None = Field(default=None, ge=0, le=_INT32_MAX, description="0, the default, keeps all tokens.")
    min_p: float | None = Field(default=None, description="0 to 1; default 0.")
    repetition_penalty: float | None = Field(default=None, description="0.1 to 10; default 1.")
    seed: int | None = Field(
        default=None, ge=0, le=limits.SEED_MAX, description="Equal seeds give equal draws; default 0."
    )
    stop: Annotated[list[str], BeforeValidator(_to_list, json_schema_input_type=str | list[str] | None)] = Field(
        default=[],
        max_length=limits.STOP_STRINGS_MAX,
        description="Texts that end the completion beside the bundle's stop tokens.",
    )
    stream: bool = Field(default=False, description="Answer by server-sent events.")
    stream_options: StreamOptions | None = None
    truncate_prompt: bool = Field(default=False, description="Drop the oldest tokens of a prompt that is too long.")
    n: Literal[1] = Field(default=1, description="One completion a request.")
    user: str | None = Field(default=None, description="Accepted for compatibility; has no effect.")
    frequency_penalty: _Zero | None = Field(default=None, description="Only 0; use repetition_penalty.")
    presence_penalty: _Zero | None = Field(default=None, description="Only 0; use repetition_penalty.")

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has an effect only with stream: true")
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=limits.HTTP_MESSAGES_MAX)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=_INT32_MAX, description="The newer name of max_tokens; give one of them."
    )
    logprobs: bool = Field(default=False, description="Return the log-probability of each token.")
    top_logprobs: Annotated[int, _TOP_LOGPROBS] | None = Field(
        default=None, description="Also of the most likely tokens; needs logprobs: true."
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has an effect only with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[_TokenId], Tag("ids")],
        Discriminator(lambda value: "ids" if isinstance(value, list) else "text"),
        BeforeValidator(
            _only_one, json_schema_input_type=str | list[_TokenId] | Annotated[list[str], Field(max_length=1)]
        ),
    ] = Field(description="Text, token ids, or a list with one text.")
    logprobs: Annotated[int, _TOP_LOGPROBS] | None = Field(
        default=None, description="Return the log-probability of each token and of so many of the most likely ones."
    )
    echo: Literal[False] = False
    best_of: Literal[1] = 1


Body = TypeVar("Body", bound=GenerationRequest)


def parse(kind: type[Body], data: bytes) -> Body:
    """The request in `data`; BadRequest names the first field that is wrong, its value's problem and near names."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1]), list(kind.model_fields), n=1)
            hint = f"; did you mean {near[0]}?" if near and len(first["loc"]) == 1 else ""
            problem = f"this field is not supported{hint}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = f"{path}: {problem}{more}" if path else f"request body: {problem}{more}"
        raise BadRequest(message, details={"field": path} if path else {}) from None
