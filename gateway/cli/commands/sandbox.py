"""Commands about the sandbox: run a program, see how well it isolates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from smelt.sandbox.v1 import sandbox_pb2

from gateway.cli.documents import enum_word, to_document
from gateway.cli.options import Json
from gateway.cli.runner import run
from gateway.cli.sandbox_view import describe_view, outcome_view
from smeltkit import limits
from smeltkit.errors import UnknownSource

if TYPE_CHECKING:
    from gateway.cli.session import Session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run a program in the sandbox, or see how it isolates.",
)


@app.command("run")
def run_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Python program, or - for standard input.")],
    stdin: Annotated[str, typer.Option("--stdin", metavar="FILE", help="What the program reads.")] = "",
    cpu_s: Annotated[float | None, typer.Option("--cpu-s", help="CPU seconds.")] = None,
    wall_s: Annotated[float | None, typer.Option("--wall-s", help="Wall-clock seconds.")] = None,
    memory_mib: Annotated[int | None, typer.Option("--memory-mib", help="Memory of the whole tree.")] = None,
    as_json: Json = False,
) -> None:
    """Runs a program under the judge's limits; ends with 0 only if it ended with status 0."""

    async def work(session: Session) -> None:
        request = sandbox_pb2.ExecuteRequest(code=_read(file), stdin=_read(stdin) if stdin else b"")
        request.limits.CopyFrom(
            sandbox_pb2.Limits(
                cpu_s=cpu_s, wall_s=wall_s, memory_bytes=None if memory_mib is None else memory_mib * limits.MIB
            )
        )
        reply = await session.call(session.sandbox.Execute, request, timeout_s=limits.EXECUTE_TIMEOUT_S)
        record = to_document(reply.record)
        document = {
            **record,
            "stdout": to_document(reply)["stdout"],
            "stderr": to_document(reply)["stderr"],
            "isolation": record["level"],
            "peak_bytes": record["peak_bytes"] or None,
        }
        session.output.show(document, *outcome_view(reply))
        verdict = sandbox_pb2.Verdict.Name(reply.record.verdict)
        if reply.record.verdict != sandbox_pb2.VERDICT_PASSED:
            session.output.note(f"{enum_word('Verdict', verdict)}: {reply.record.detail}")
            raise typer.Exit(1)

    run("sandbox run", work, as_json=as_json)


@app.command("doctor")
def doctor(as_json: Json = False) -> None:
    """Shows the isolation layers that work here, and how to get those that are missing."""

    async def work(session: Session) -> None:
        reply = await session.call(session.sandbox.Describe, sandbox_pb2.DescribeRequest())
        session.output.show(to_document(reply), *describe_view(reply))

    run("sandbox doctor", work, as_json=as_json)


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    path = Path(file)
    if not path.is_file():
        raise UnknownSource(f"{file} does not exist; give a file or - for standard input")
    return path.read_bytes()
