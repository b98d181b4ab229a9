"""How a command ends when it is refused, when its reader leaves, and when it cannot write."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import pytest
from scripted_gateway import gateway
from smelt.evaluator.v1 import evaluator_pb2

from smeltkit.errors import UnknownModel


def _unknown(request: object) -> NoReturn:
    raise UnknownModel("nothing is called 'nope'")


async def test_a_refusal_is_no_crash(tmp_path: Path) -> None:
    async with gateway({"ArtifactService.GetArtifact": _unknown}) as running:
        ended = await running.smelt("run", "nope", "hi", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path))
    assert (ended.code, "UNKNOWN_MODEL" in ended.err) == (3, True)
    assert list((tmp_path / "crashes").iterdir()) == []


async def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    """As `smelt ... | head` does: the shell's code for SIGPIPE, no word, no report of a crash."""
    suites = evaluator_pb2.ListSuitesResponse(suites=[evaluator_pb2.Suite(name=f"suite-{i}") for i in range(2000)])
    async with gateway({"EvaluatorService.ListSuites": lambda request: suites}) as running:
        process = await running.start("suites", "--json", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path))
        assert process.stdout and process.stderr
        await process.stdout.read(10)
        process.stdout._transport.close()  # type: ignore[attr-defined]
        code = await asyncio.wait_for(process.wait(), 60)
        told = await process.stderr.read()
    assert (code, told) == (141, b"")
    assert list((tmp_path / "crashes").iterdir()) == []


async def test_a_folder_for_traces_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with gateway({}) as running:
        ended = await running.smelt("models", "--json", SMELT_TELEMETRY_TRACE_DIR=str(tmp_path / "file"))
    assert ended.code == 2
    assert f"traces cannot be written to {tmp_path / 'file'}" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "ore", "hi", "--max-tokens", "99999999999999"),
        ("run", "ore", "hi", "--seed", "99999999999999999999"),
        ("eval", "--suite", "basic", "ore", "--samples", "99999999999"),
        ("eval", "--suite", "basic", "ore", "--limit", "99999999999"),
        ("eval", "--suite", "basic", "ore", "--max-tokens", "9999999999"),
    ],
    ids=" ".join,
)
async def test_numbers_that_no_request_holds_are_refused_with_their_bound(arguments: tuple[str, ...]) -> None:
    async with gateway({}) as running:
        ended = await running.smelt(*arguments)
        assert not running.requests
    assert ended.code == 2
    assert f"Invalid value for '{arguments[-2]}'" in ended.err and "less than or equal to" in ended.err
