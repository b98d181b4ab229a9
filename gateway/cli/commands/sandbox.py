"""Commands about the sandbox: run or judge a program, see how well it isolates and how fast it is."""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from smelt.sandbox.v1 import sandbox_pb2

from gateway.cli.documents import enum_word, to_document
from gateway.cli.options import Json
from gateway.cli.runner import run
from gateway.cli.sandbox_bench import measure_starts, measure_verdicts
from gateway.cli.sandbox_view import bench_view, describe_view, outcome_view
from smeltkit import limits
from smeltkit.errors import BadCode, UnknownSource, UnsupportedOption

if TYPE_CHECKING:
    from gateway.cli.session import Session


class Form(enum.StrEnum):
    """How tests are written."""

    ASSERTS = "asserts"
    CHECK = "check"
    UNITTEST = "unittest"
    CALLS = "calls"


class Mode(enum.StrEnum):
    """Where tests run."""

    SPLIT = "split"
    INSIDE = "inside"


_REQUEST_MAX = (1 << 31) - 1
"""What a request can hold; the service's own bounds are narrower, and its refusal tells them."""
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run or judge a program in the sandbox, see how it isolates, or how fast it is.",
)


@app.command("run")
def run_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Python program, or - for standard input.")],
    stdin: Annotated[str, typer.Option("--stdin", metavar="FILE", help="What the program reads.")] = "",
    cpu_s: Annotated[float | None, typer.Option("--cpu-s", help="CPU seconds.")] = None,
    wall_s: Annotated[float | None, typer.Option("--wall-s", help="Wall-clock seconds.")] = None,
    memory_mib: Annotated[
        int | None, typer.Option("--memory-mib", min=1, max=_REQUEST_MAX, help="Memory of the whole tree.")
    ] = None,
    pids: Annotated[
        int | None, typer.Option("--pids", min=1, max=_REQUEST_MAX, help="Processes and threads at once.")
    ] = None,
    tmp_mib: Annotated[int | None, typer.Option("--tmp-mib", min=1, max=_REQUEST_MAX, help="Size of /tmp.")] = None,
    output_kib: Annotated[
        int | None, typer.Option("--output-kib", min=1, max=_REQUEST_MAX, help="stdout and stderr together.")
    ] = None,
    tests: Annotated[str, typer.Option("--tests", metavar="FILE", help="Judge it by these tests.")] = "",
    form: Annotated[
        Form | None, typer.Option("--form", help="How the tests are written: asserts unless it is said.")
    ] = None,
    entry_point: Annotated[str, typer.Option("--entry-point", help="For check and calls: the function.")] = "",
    exports: Annotated[str, typer.Option("--exports", help="Names that the tests use, separated by commas.")] = "",
    mode: Annotated[
        Mode | None, typer.Option("--mode", help="Where the tests run: outside the program if they allow it.")
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="Interpreter: see doctor.")] = "",
    as_json: Json = False,
) -> None:
    """Runs a program under the judge's limits, or judges it; ends with 0 only if it ended with status 0, or passed."""

    async def work(session: Session) -> None:
        of_tests = {"--form": form, "--entry-point": entry_point, "--exports": exports, "--mode": mode}
        _check_effects(tests, stdin, of_tests)
        bounds = sandbox_pb2.Limits(
            cpu_s=cpu_s,
            wall_s=wall_s,
            memory_bytes=_bytes(memory_mib, limits.MIB),
            pids=pids,
            output_bytes=_bytes(output_kib, limits.KIB),
            tmp_bytes=_bytes(tmp_mib, limits.MIB),
        )
        if tests:
            candidate = sandbox_pb2.Candidate(
                code=_read(file),
                form=sandbox_pb2.Form.Value(f"FORM_{(form or Form.ASSERTS).name}"),
                tests=_read_text(tests),
                entry_point=entry_point,
                exports=[name.strip() for name in exports.split(",") if name.strip()],
                mode=sandbox_pb2.Mode.Value(f"MODE_{mode.name if mode else 'UNSPECIFIED'}"),
                limits=bounds,
                profile=profile,
            )
            reply = await _judge(session, candidate)
        else:
            request = sandbox_pb2.ExecuteRequest(
                code=_read(file), stdin=_read(stdin) if stdin else b"", limits=bounds, profile=profile
            )
            reply = await session.call(session.sandbox.Execute, request, timeout_s=limits.EXECUTE_TIMEOUT_S)
        session.output.show(_document(reply), *outcome_view(reply))
        if reply.record.verdict != sandbox_pb2.VERDICT_PASSED:
            verdict = enum_word("Verdict", sandbox_pb2.Verdict.Name(reply.record.verdict))
            session.output.note(f"{verdict}: {reply.record.detail}")
            raise typer.Exit(1)

    run("sandbox run", work, as_json=as_json)


@app.command("doctor")
def doctor(as_json: Json = False) -> None:
    """Shows the isolation layers that work here, and how to get those that are missing."""

    async def work(session: Session) -> None:
        reply = await session.call(session.sandbox.Describe, sandbox_pb2.DescribeRequest())
        session.output.show(to_document(reply), *describe_view(reply))

    run("sandbox doctor", work, as_json=as_json)


@app.command("bench")
def bench(
    starts: Annotated[int, typer.Option("--starts", min=2, help="Programs to start one after the other.")] = 50,
    verdicts: Annotated[int, typer.Option("--verdicts", min=1, help="Candidates to judge side by side.")] = 300,
    as_json: Json = False,
) -> None:
    """Measures round trips of an empty program, and verdicts a second on a one-line function."""

    async def work(session: Session) -> None:
        found = await session.call(session.sandbox.Describe, sandbox_pb2.DescribeRequest())
        document = {
            "level": found.level,
            "slots": found.slots,
            **await measure_starts(session, starts),
            **await measure_verdicts(session, verdicts, side_by_side=2 * found.slots),
        }
        session.output.show(document, *bench_view(document))

    run("sandbox bench", work, as_json=as_json)


async def _judge(session: Session, candidate: sandbox_pb2.Candidate) -> sandbox_pb2.ExecuteResponse:
    """The verdict on `candidate`, as what a program without tests gives."""
    request = sandbox_pb2.JudgeRequest(candidate=candidate)
    judged = await session.call(session.sandbox.Judge, request, timeout_s=limits.EXECUTE_TIMEOUT_S)
    stdout, stderr = judged.record.stdout_head.encode(), judged.record.stderr_head.encode()
    return sandbox_pb2.ExecuteResponse(record=judged.record, stdout=stdout, stderr=stderr)


def _document(reply: sandbox_pb2.ExecuteResponse) -> dict[str, object]:
    """The record with both streams; null for what was not measured."""
    document = to_document(reply)
    record = document["record"]
    return {
        **record,
        "stdout": document["stdout"],
        "stderr": document["stderr"],
        "isolation": record["level"],
        "peak_bytes": record["peak_bytes"] or None,
        "calls": None if record["is_uncounted"] else record["calls"],
    }


def _bytes(count: int | None, unit: int) -> int | None:
    return None if count is None else count * unit


def _read(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    path = Path(file)
    if not path.is_file():
        fault = "is no plain file" if path.exists() else "does not exist"
        raise UnknownSource(f"{file} {fault}; give a file or - for standard input")
    return path.read_bytes()


def _read_text(file: str) -> str:
    try:
        return _read(file).decode()
    except UnicodeDecodeError as error:
        raise BadCode(f"{file} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


def _check_effects(tests: str, stdin: str, of_tests: Mapping[str, object]) -> None:
    """UnsupportedOption for what would change nothing."""
    given = [name for name, value in of_tests.items() if value]
    if given and not tests:
        raise UnsupportedOption(f"{given[0]} has no effect without --tests; add --tests FILE, or remove it")
    if stdin and tests:
        raise UnsupportedOption("--stdin has no effect with --tests, which call functions; remove one of them")
