"""Commands about the platform on this machine: up, down, status, doctor, logs."""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.cli.options import Json
from gateway.cli.output import Output, facts, table
from gateway.cli.runner import run_locally
from smeltkit.config import smelt_home
from smeltkit.errors import StackDown, UnknownSource

if TYPE_CHECKING:
    from gateway.stack import StackStatus

app = typer.Typer(rich_markup_mode=None)


@app.command("up")
def up(as_json: Json = False) -> None:
    """Starts the platform, or what of it does not run."""

    def work(output: Output) -> None:
        from gateway.cli.platform import started

        _show(output, started(output))

    run_locally(work, as_json=as_json)


@app.command("down")
def down(as_json: Json = False) -> None:
    """Stops the platform; its data stays."""

    def work(output: Output) -> None:
        from gateway.cli.platform import unfinished_jobs
        from gateway.stack import status, stop

        if count := unfinished_jobs():
            output.note(f"jobs that are not over: {count}; they go on when the platform is up again")
        stop(smelt_home(), report=output.note)
        output.show(_document(status(smelt_home())), "stopped")

    run_locally(work, as_json=as_json)


@app.command("status")
def status_(as_json: Json = False) -> None:
    """Shows what runs, and where; ends with 5 unless everything is healthy."""

    def work(output: Output) -> None:
        from gateway.stack import status

        found = status(smelt_home())
        _show(output, found)
        if not found.is_up:
            output.note("not everything runs; `smelt up` starts what is missing")
            raise typer.Exit(StackDown.exit_code)

    run_locally(work, as_json=as_json)


@app.command("doctor")
def doctor(as_json: Json = False) -> None:
    """Checks that this machine has what the platform needs and that nothing crashed of late; ends with 1 if not."""

    def work(output: Output) -> None:
        from gateway.cli.doctor import examine

        findings = examine(smelt_home())
        rows = ((finding.subject, "ok" if finding.is_ok else "NOT OK", finding.detail) for finding in findings)
        document = [{"subject": item.subject, "is_ok": item.is_ok, "detail": item.detail} for item in findings]
        output.show({"findings": document}, table(("", "", ""), rows))
        if not all(finding.is_ok for finding in findings):
            raise typer.Exit(1)

    run_locally(work, as_json=as_json)


@app.command("logs")
def logs(
    process: Annotated[
        str, typer.Argument(help="importer, trainer, inference, evaluator, sandbox, gateway, nats, s3.")
    ],
    lines: Annotated[int, typer.Option("--lines", min=1, max=100_000, help="How many lines from the end.")] = 50,
) -> None:
    """Shows the last lines that a process of the platform logged: JSON, one object a line."""

    def work(output: Output) -> None:
        path = smelt_home() / "logs" / f"{process}.log"
        known = sorted(found.stem for found in path.parent.glob("*.log"))
        if process not in known:
            raise UnknownSource(f"no log of {process!r} in {path.parent}; there are: {', '.join(known) or 'none'}")
        with path.open(errors="replace") as file:
            sys.stdout.writelines(deque(file, maxlen=lines))

    run_locally(work)


def _show(output: Output, found: StackStatus) -> None:
    rows = ((item.name, item.health, item.pid or "", item.address) for item in found.components)
    where = facts([("home", found.home), ("gRPC", found.gateway_grpc), ("HTTP", found.gateway_http)])
    output.show(_document(found), table(("process", "state", ">pid", "address"), rows), where)


def _document(found: StackStatus) -> dict[str, Any]:
    return {
        "is_up": found.is_up,
        "gateway_grpc": found.gateway_grpc,
        "gateway_http": found.gateway_http,
        "components": [
            {"name": item.name, "health": item.health, "pid": item.pid, "address": item.address}
            for item in found.components
        ],
    }
