"""Runs the body of one command: telemetry, event loop, way to the gateway, errors as exit codes.

Only here the heavy part (gRPC, OpenTelemetry) is loaded, when a command really does something.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn

import typer

from gateway.cli.output import Output
from smeltkit.config import environment, smelt_home
from smeltkit.errors import SmeltError

if TYPE_CHECKING:
    from gateway.cli.session import Session

INTERRUPTED = 130
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

    shutdown = None
    try:
        check_settings()
        trace_dir = "" if configured_gateway() else str(smelt_home() / "traces")
        shutdown = telemetry.setup("cli", log_stream=sys.stderr, log_level="WARNING", trace_dir=trace_dir)
        asyncio.run(main(gateway_address(output)))
    except SmeltError as error:
        fail(output, error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if shutdown is not None:
            shutdown()


def _parent() -> dict[str, str]:
    """The trace that a script gave its commands in TRACEPARENT, so that they are one trace; empty if none."""
    return {key: value for key in ("traceparent", "tracestate") if (value := environment().get(key.upper()))}


def run_locally(work: Callable[[Output], None], *, as_json: bool = False) -> None:
    """Runs what needs no gateway."""
    from gateway.cli.settings import check_settings

    output = Output(as_json)
    try:
        check_settings()
        work(output)
    except SmeltError as error:
        fail(output, error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def fail(output: Output, error: SmeltError) -> NoReturn:
    """Prints the error and ends with its exit code."""
    output.error(error)
    raise typer.Exit(error.exit_code) from None
