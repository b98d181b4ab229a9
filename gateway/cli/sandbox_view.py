"""Outcomes and isolation layers as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from smelt.sandbox.v1 import sandbox_pb2

from gateway.cli.documents import enum_word
from gateway.cli.output import facts, human_bytes, human_time, table


def outcome_view(reply: sandbox_pb2.ExecuteResponse) -> list[RenderableType]:
    """What happened to the program, then what it wrote: each line behind a bar, so that none can pass for ours."""
    record = reply.record
    known = facts(
        [
            ("verdict", enum_word("Verdict", sandbox_pb2.Verdict.Name(record.verdict))),
            ("detail", record.detail),
            ("calls", "-" if record.is_uncounted else record.calls),
            ("status", record.exit_status if record.HasField("exit_status") else ""),
            ("signal", record.signal or ""),
            ("wall", human_time(record.wall_s)),
            ("cpu", human_time(record.cpu_s)),
            ("peak memory", human_bytes(record.peak_bytes) if record.peak_bytes else "-"),
            ("isolation", record.level),
            ("missing layers", ", ".join(record.missing_layers)),
        ]
    )
    return [known, *_written("stdout", reply.stdout), *_written("stderr", reply.stderr)]


def _written(name: str, stream: bytes) -> Iterator[RenderableType]:
    """A heading and the stream's lines; what would move a terminal's cursor is written as its escape."""
    if not stream:
        return
    yield Text(f"{name}, {human_bytes(len(stream))}", style="bold")
    for line in stream.decode(errors="replace").removesuffix("\n").split("\n"):
        yield Text("| " + "".join(char if char.isprintable() else repr(char)[1:-1] for char in line))


def bench_view(document: Mapping[str, Any]) -> list[RenderableType]:
    """Each figure of a measurement with its unit."""
    figures = {name: value for name, value in document.items() if isinstance(value, float)}
    known = facts([("level", document["level"]), ("slots", document["slots"])])
    return [known, table(("figure", "value"), ((name, f"{value:.3g}") for name, value in figures.items()))]


def describe_view(reply: sandbox_pb2.DescribeResponse) -> list[RenderableType]:
    """Level and layers, with the remedy for each that is missing."""
    known = facts(
        [
            ("level", reply.level),
            ("required", reply.required_level),
            ("slots", reply.slots),
            ("profiles", ", ".join(f"{name} {reply.profile_digests[name]}".strip() for name in reply.profiles)),
            ("judge", reply.judge_digest),
        ]
    )
    rows = (
        (layer.name, "yes" if layer.is_present else "NO", "; ".join(filter(None, (layer.error, layer.remedy))))
        for layer in reply.layers
    )
    return [known, table(("layer", "works", ""), rows)]
