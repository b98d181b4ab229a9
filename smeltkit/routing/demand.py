"""What a request asks of a replica, told from the request alone: model, tokens, and the beginnings of its prompt.

Router and replica both count by this, so that a replica's report and a router's own count are the same unit.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from smelt.inference.v1 import inference_pb2 as pb

from smeltkit import limits

TOKEN_BYTES = 4
"""Bytes of a token: exactly of an id, about of text."""
_BLOCK_BYTES = limits.ROUTE_BLOCK_TOKENS * TOKEN_BYTES
_METHODS = pb.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name
_REQUESTS: Mapping[str, type[Message]] = {
    f"/{method.containing_service.full_name}/{name}": message_factory.GetMessageClass(method.input_type)
    for name, method in _METHODS.items()
}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one request asks for; empty for a request that any replica answers alike."""

    model: str = ""
    """Digest of the bundle."""
    tokens: int = 0
    """Tokens of its prompt, by its length, and of the longest completion it allows."""
    beginnings: tuple[bytes, ...] = ()
    """Digests of the first block of the prompt, of the first two, and so on: equal ones mean an equal beginning."""


def demand_of(method: str, request: Any) -> Demand:
    """The demand of a call of `method` (`/package.Service/Method`); `request` may still be bytes."""
    if isinstance(request, bytes) and method in _REQUESTS:
        try:
            request = _REQUESTS[method].FromString(request)
        except DecodeError:
            return Demand()
    model = getattr(request, "model", "")
    if not isinstance(request, pb.GenerateRequest | pb.ScoreRequest):
        return Demand(model=model)
    prompt = _prompt_bytes(request)
    wanted = 0
    if isinstance(request, pb.GenerateRequest):
        wanted = request.max_tokens if request.max_tokens > 0 else limits.ROUTE_COMPLETION_TOKENS
    return Demand(model=model, tokens=len(prompt) // TOKEN_BYTES + wanted, beginnings=_beginnings(model, prompt))


def _prompt_bytes(request: Any) -> bytes:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        return array("i", request.tokens.ids).tobytes()
    if kind == "chat":
        return "\0".join(part for message in request.chat.messages for part in (message.role, message.content)).encode()
    return bytes(request.text.encode())


def _beginnings(model: str, prompt: bytes) -> tuple[bytes, ...]:
    digest, found = blake2b(model.encode(), digest_size=16), []
    for start in range(0, min(len(prompt), limits.ROUTE_BLOCKS_MAX * _BLOCK_BYTES) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        digest.update(prompt[start : start + _BLOCK_BYTES])
        found.append(digest.digest())
    return tuple(found)
