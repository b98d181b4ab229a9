"""Commands that generate: run once, or chat."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from smelt.artifact.v1 import artifact_pb2
from smelt.inference.v1 import inference_pb2

from gateway.cli.documents import to_document
from gateway.cli.options import Json, Reference
from gateway.cli.runner import run
from smeltkit import limits
from smeltkit.errors import PromptTooLong, UnsupportedOption
from smeltkit.ids import new_id

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(rich_markup_mode=None)

MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", min=0, max=limits.NEW_TOKENS_MAX, help="At most this many new tokens; 0 for the context."
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Share of probability kept.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=limits.SEED_MAX, help="Seed of the sampling.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the reply; may be given again.")]
TruncatePrompt = Annotated[
    bool, typer.Option("--truncate-prompt", help="Drop the oldest tokens of a prompt that is too long.")
]


@app.command("run")
def run_(
    reference: Reference,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text, or - for standard input.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    truncate_prompt: TruncatePrompt = False,
    as_json: Json = False,
) -> None:
    """Generates once and streams the text as it comes."""

    async def work(session: Session) -> None:
        artifact = await session.artifact(reference)
        sampling = inference_pb2.Sampling(temperature=temperature, top_p=top_p, seed=seed)
        request = _request(artifact, max_tokens, sampling, stop, truncate_prompt)
        text = sys.stdin.read() if prompt == "-" else prompt
        if raw or not _is_chat(artifact):
            if system:
                raise UnsupportedOption("--system needs a chat model and the chat template; leave it or --raw out")
            request.text = text
        else:
            messages = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
            request.chat.messages.extend([*messages, inference_pb2.ChatMessage(role="user", content=text)])
        reply = await _generate(session, request)
        session.output.show(reply)

    run("run", work, as_json=as_json)


@app.command("chat")
def chat(
    reference: Reference,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    truncate_prompt: TruncatePrompt = False,
) -> None:
    """Talks to a model, one message a line; /reset forgets, Ctrl-D ends."""

    async def work(session: Session) -> None:
        artifact = await session.artifact(reference)
        if not _is_chat(artifact):
            raise UnsupportedOption(f"{reference} has no chat template; use `smelt run {reference} PROMPT`")
        first = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
        messages = list(first)
        while (line := _read_line()) is not None:
            if line == "/reset":
                messages = list(first)
                continue
            messages.append(inference_pb2.ChatMessage(role="user", content=line))
            sampling = inference_pb2.Sampling(temperature=temperature, top_p=top_p, seed=seed)
            request = _request(artifact, max_tokens, sampling, None, truncate_prompt)
            request.chat.messages.extend(messages)
            reply = await _generate(session, request)
            messages.append(inference_pb2.ChatMessage(role="assistant", content=reply["text"]))

    run("chat", work)


def _request(
    artifact: artifact_pb2.Artifact,
    max_tokens: int,
    sampling: inference_pb2.Sampling,
    stop: list[str] | None,
    truncate_prompt: bool,
) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model=artifact.digest,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop or [],
        request_id=new_id("req"),
        truncate_prompt=truncate_prompt,
    )


async def _generate(session: Session, request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """Streams one completion to standard output (unless one document was asked for); all of it as a document."""
    try:
        return await _streamed(session, request)
    except PromptTooLong as error:
        message = error.message.replace("max_tokens", "--max-tokens").replace("truncate_prompt", "--truncate-prompt")
        raise PromptTooLong(message, details=error.details) from error


async def _streamed(session: Session, request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    text, effective, last = "", None, inference_pb2.GenerateResponse()
    async with session.stream(session.inference.Generate, request, timeout_s=limits.GENERATE_TIMEOUT_S) as replies:
        async for reply in replies:
            effective, last = reply.effective if reply.HasField("effective") else effective, reply
            text += reply.text
            if not session.output.as_json:
                print(reply.text, end="", flush=True)
    if not session.output.as_json:
        print(flush=True)
    for warning in effective.warnings if effective is not None else ():
        session.output.note(f"warning: {warning}")
    if effective is not None and effective.dropped_tokens:
        session.output.note(f"warning: the oldest {effective.dropped_tokens} tokens of the prompt were dropped")
    document = to_document(last)
    return {
        "text": text,
        "finish_reason": document["finish_reason"],
        "completion_tokens": last.completion_tokens,
        "effective": to_document(effective) if effective is not None else None,
    }


def _is_chat(artifact: artifact_pb2.Artifact) -> bool:
    return bool(json.loads(artifact.config_json or "{}").get("contract", {}).get("task") == "chat")


def _read_line() -> str | None:
    """The next message, None at the end of input; empty lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        if line.strip():
            return line
