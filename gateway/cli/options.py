"""Arguments and options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Plan: TypeAlias = Annotated[bool, typer.Option("--plan", help="Say what would happen, and do nothing.")]
Wait: TypeAlias = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job, or only start it.")]
Reference: TypeAlias = Annotated[
    str, typer.Argument(metavar="REF", help="Name of a model, or its digest or the first digits of it.")
]
Name: TypeAlias = Annotated[str, typer.Option("--name", help="Name for the result, with or without :tag.")]
SuiteName: TypeAlias = Annotated[str, typer.Option("--suite", help="Benchmark suite; see `smelt suites`.")]
Data: TypeAlias = Annotated[
    str, typer.Option("--data", metavar="DIR|FILE", help="Where the suite's data is; not needed once it is stored.")
]
JobId: TypeAlias = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
WaitGpu: TypeAlias = Annotated[
    bool, typer.Option("--wait-gpu", help="Wait while the GPUs are leased to others or in use, instead of failing.")
]
Vram: TypeAlias = Annotated[
    str,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Take at most this much of each GPU, e.g. 40GiB, and share it with others that say so too.",
    ),
]
