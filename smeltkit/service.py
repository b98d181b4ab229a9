"""How every process of the platform runs: telemetry around it, and a refusal is one line and an exit code."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from smeltkit import telemetry
from smeltkit.errors import SmeltError

_LOG = logging.getLogger(__name__)


def run_command(command: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a process that does one thing and ends, with logs for people; a refusal is one line and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(command())
    except SmeltError as error:
        _LOG.critical("%s: %s", error.reason(), error.message)
        sys.exit(error.exit_code)


def run_service(name: str, serve: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs `serve` to its end on an event loop, with logs, spans and metrics of the service `name`.

    An error that Smelt raises on purpose ends the process with the exit code of its family and its message in the log;
    any other one is our mistake and passes through.
    """
    try:
        shutdown = telemetry.setup(name)
        try:
            asyncio.run(serve())
        finally:
            shutdown()
    except SmeltError as error:
        _LOG.critical("%s", error.message, extra={"reason": error.reason()})
        sys.exit(error.exit_code)
