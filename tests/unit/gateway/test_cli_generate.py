"""`smelt run` and `smelt chat` against a scripted gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_gateway import DIGEST, gateway, raising
from smelt.artifact.v1 import artifact_pb2
from smelt.inference.v1 import inference_pb2

from smeltkit.errors import EngineUnavailable, PromptTooLong


def _artifact(task: str) -> Any:
    config = json.dumps({"contract": {"task": task}})
    artifact = artifact_pb2.Artifact(digest=DIGEST, config_json=config)
    return lambda request: artifact_pb2.GetArtifactResponse(artifact=artifact)


def _pieces(*texts: str) -> Any:
    effective = inference_pb2.Effective(model=DIGEST, engine="llama", warnings=["the context is small"])
    first = inference_pb2.GenerateResponse(effective=effective)
    middle = [inference_pb2.GenerateResponse(text=text) for text in texts]
    last = inference_pb2.GenerateResponse(finish_reason="FINISH_REASON_STOP", completion_tokens=len(texts))
    return lambda request: [first, *middle, last]


def _answers(task: str = "chat") -> dict[str, Any]:
    return {
        "ArtifactService.GetArtifact": _artifact(task),
        "InferenceService.Generate": _pieces("def ", "f():", "\n    pass"),
    }


async def test_text_goes_to_standard_output_and_warnings_do_not() -> None:
    """What is piped on is exactly the completion and a line end."""
    async with gateway(_answers()) as running:
        ended = await running.smelt("run", "ore", "write f", "--seed", "7", "--stop", "END")
        (request,) = running.requests["InferenceService.Generate"]
    assert ended.out == "def f():\n    pass\n"
    assert "the context is small" in ended.err
    assert (request.model, request.sampling.seed, list(request.stop)) == (DIGEST, 7, ["END"])


async def test_json_holds_text_reason_and_what_was_effective() -> None:
    """One document, nothing streamed beside it."""
    async with gateway(_answers()) as running:
        document = json.loads((await running.smelt("run", "ore", "write f", "--json")).out)
    assert (document["text"], document["finish_reason"], document["completion_tokens"]) == (
        "def f():\n    pass",
        "stop",
        3,
    )
    assert document["effective"]["engine"] == "llama"


@pytest.mark.parametrize(
    "task,options,kind",
    [("chat", (), "chat"), ("chat", ("--raw",), "text"), ("completion", (), "text")],
    ids=["chat model", "chat model, raw", "base model"],
)
async def test_prompt_is_rendered_for_chat_models_only(task: str, options: tuple[str, ...], kind: str) -> None:
    """A base model, or --raw, gets the text as it is; standard input is read for `-`. R-037"""
    async with gateway(_answers(task)) as running:
        await running.smelt("run", "ore", "-", *options, stdin="hello")
        (request,) = running.requests["InferenceService.Generate"]
    assert request.WhichOneof("prompt") == kind
    assert "hello" in (request.text, *(message.content for message in request.chat.messages))


async def test_option_without_effect_is_refused() -> None:
    """A system message for a model without a chat template is an error, not a silence. R-006"""
    async with gateway(_answers("completion")) as running:
        ended = await running.smelt("run", "ore", "hello", "--system", "be brief")
    assert ended.code == 2
    assert "UNSUPPORTED_OPTION" in ended.err


@pytest.mark.parametrize("error,code", [(PromptTooLong("9000 tokens"), 2), (EngineUnavailable("gone"), 5)])
async def test_failed_generation_gives_the_exit_code_of_its_error(error: Exception, code: int) -> None:
    """Wrong use and try later are told apart."""
    async with gateway({**_answers(), "InferenceService.Generate": raising(error)}) as running:
        assert (await running.smelt("run", "ore", "hello")).code == code


async def test_prompt_that_is_too_long_names_the_options_of_this_command() -> None:
    """R-035: the service speaks of its fields, the command of what can be typed here."""
    error = PromptTooLong("9000 prompt tokens; shorten the prompt, lower max_tokens or set truncate_prompt")
    async with gateway({**_answers(), "InferenceService.Generate": raising(error)}) as running:
        ended = await running.smelt("run", "ore", "hello")
    assert "lower --max-tokens or set --truncate-prompt" in ended.err


async def test_prompt_is_cut_when_asked_and_the_loss_is_told() -> None:
    """R-035: how many tokens were dropped stands beside the answer, and only what is asked for is cut."""
    effective = inference_pb2.Effective(model=DIGEST, dropped_tokens=12)
    replies = [inference_pb2.GenerateResponse(effective=effective, finish_reason="FINISH_REASON_STOP")]
    async with gateway({**_answers(), "InferenceService.Generate": lambda request: replies}) as running:
        ended = await running.smelt("run", "ore", "hello", "--truncate-prompt")
        await running.smelt("chat", "ore", "--truncate-prompt", stdin="one\n")
        await running.smelt("chat", "ore", stdin="one\n")
        requests = running.requests["InferenceService.Generate"]
    assert [request.truncate_prompt for request in requests] == [True, True, False]
    assert "12 tokens of the prompt were dropped" in ended.err


async def test_chat_sends_what_was_said_before_until_it_is_reset() -> None:
    """Each turn carries the earlier ones; /reset keeps the system message."""
    async with gateway(_answers()) as running:
        ended = await running.smelt("chat", "ore", "--system", "be brief", stdin="one\n\ntwo\n/reset\nthree\n")
        requests = running.requests["InferenceService.Generate"]
    assert ended.code == 0, ended.err
    said = [[(message.role, message.content) for message in request.chat.messages] for request in requests]
    reply = ("assistant", "def f():\n    pass")
    system = ("system", "be brief")
    assert said == [
        [system, ("user", "one")],
        [system, ("user", "one"), reply, ("user", "two")],
        [system, ("user", "three")],
    ]
