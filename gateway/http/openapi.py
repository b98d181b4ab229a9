"""The edge's description in OpenAPI 3.1, made from the models that really parse and answer.

`contracts/interface/openapi.yaml` is its checked-in copy, written by `python -m scripts.openapi`.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import models_json_schema

from gateway.http import replies, schemas

_MODELS: Final = (
    (schemas.ChatRequest, "validation"),
    (schemas.CompletionRequest, "validation"),
    *(
        (model, "serialization")
        for model in (
            replies.ChatCompletion,
            replies.ChatChunk,
            replies.TextCompletion,
            replies.ModelList,
            replies.ModelInfo,
            replies.Health,
            replies.ErrorBody,
        )
    ),
)
_REF: Final = "#/components/schemas/{model}"


def document() -> dict[str, Any]:
    """The whole description as plain values."""
    _, definitions = models_json_schema(_MODELS, ref_template=_REF)  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Smelt HTTP edge",
            "version": "1",
            "description": "OpenAI-compatible completions on stored bundles. A request field that is not listed is"
            " refused by name. Every answer has x-request-id; one that may pass later has retry-after.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _generation("ChatRequest", "ChatCompletion", "ChatChunk", "A chat answer.")
            },
            "/v1/completions": {
                "post": _generation("CompletionRequest", "TextCompletion", "TextCompletion", "A continued text.")
            },
            "/v1/models": {"get": _get("ModelList", "The models that can be asked for.")},
            "/v1/models/{model}": {"get": {"parameters": [_MODEL], **_get("ModelInfo", "One model.")}},
            "/v2/health/live": {"get": _get("Health", "Whether the process answers.", is_open=True)},
            "/v2/health/ready": {
                "get": _get("Health", "Whether requests can be served; 503 names what is missing.", 503, is_open=True)
            },
            "/healthz": {"get": _get("Health", "The same as /v2/health/live.", is_open=True)},
            "/metrics": {"get": {"responses": {"200": _text("Counts in the text format of Prometheus.")}}},
        },
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "If keys are configured."}},
        },
        "security": [{"key": []}],
    }


_MODEL: Final = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "Name of a model; it may contain slashes.",
    "schema": {"type": "string"},
}


def _generation(request: str, whole: str, chunk: str, summary: str) -> dict[str, Any]:
    events = "Events `data: CHUNK`, ended by `data: [DONE]`; `event: error` carries ErrorBody and ends the stream."
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {
            "200": {
                "description": events,
                "content": {"application/json": {"schema": _ref(whole)}, "text/event-stream": {"schema": _ref(chunk)}},
            },
            "default": _json("ErrorBody", "What went wrong; `error.code` is stable."),
        },
    }


def _get(reply: str, summary: str, *others: int, is_open: bool = False) -> dict[str, Any]:
    codes = {str(code): _json(reply, summary) for code in (200, *others)}
    errors = {} if is_open else {"default": _json("ErrorBody", "What went wrong; `error.code` is stable.")}
    return {"summary": summary, "responses": codes | errors, **({"security": []} if is_open else {})}


def _json(schema: str, description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _text(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=schema)}
