"""Runs the body of one command: telemetry, event loop, way to the gateway, errors as exit codes.

Only here the heavy part (gRPC, OpenTelemetry) is loaded, when a command really does something.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from gateway.cli.output import Output
from smeltkit.config import environment, smelt_home
from smeltkit.errors import SmeltError

if TYPE_CHECKING:
    from gateway.cli.session import Session

INTERRUPTED, READER_LEFT = 130, 141
"""What a shell gives for SIGINT and SIGPIPE."""
Work = Callable[["Session"], Awaitable[None]]


def run(command: str, work: Work, *, as_json: bool = False) -> None:
    """Runs `work` with a session at the gateway, which is started if it is the local one and does not run."""
    from gateway.cli.platform import configured_gateway, gateway_address
    from gateway.cli.session import open_session
    from gateway.cli.settings import check_settings
    from smeltkit import telemetry
    from smeltkit.telemetry import names

    output = Output(as_json)

    async def main(address: str) -> None:
        with telemetry.attached(_parent()), telemetry.span(f"smelt {command}", **{names.COMMAND: command}):
            async with open_session(address, output) as session:
                await work(session)

    def traced() -> None:
        check_settings()
        trace_dir = "" if configured_gateway() else str(smelt_home() / "traces")
        ending.callback(telemetry.setup("cli", log_stream=sys.stderr, log_level="WARNING", trace_dir=trace_dir))
        asyncio.run(main(gateway_address(output)))

    with ExitStack() as ending:
        code = _exit_code(output, traced)
    if code:
        raise typer.Exit(code)


def _parent() -> dict[str, str]:
    """The trace that a script gave its commands in TRACEPARENT, so that they are one trace; empty if none."""
    return {key: value for key in ("traceparent", "tracestate") if (value := environment().get(key.upper()))}


def run_locally(work: Callable[[Output], None], *, as_json: bool = False) -> None:
    """Runs what needs no gateway."""
    from gateway.cli.settings import check_settings

    output = Output(as_json)

    def checked() -> None:
        check_settings()
        work(output)

    if code := _exit_code(output, checked):
        raise typer.Exit(code)


def _exit_code(output: Output, work: Callable[[], None]) -> int:
    """Does `work`; the exit code of how it ended. What is no refusal and no wish of the user passes through."""
    try:
        work()
        sys.stdout.flush()
    except SmeltError as error:
        output.error(error)
        return error.exit_code
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left, as `head` does: nothing may be left to write at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
    return 0
