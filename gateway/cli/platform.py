"""Where the gateway is: configured by SMELT_GATEWAY, else the platform of this machine, started if it does not run."""

from __future__ import annotations

import asyncio

from gateway.cli.output import Output
from gateway.stack import StackStatus, start
from gateway.stack.health import is_healthy
from gateway.stack.state import StackState
from smeltkit.config import environment, smelt_home


def configured_gateway() -> str:
    """The address in SMELT_GATEWAY; empty if there is none, which means the platform of this machine."""
    return environment().get("SMELT_GATEWAY", "")


def gateway_address(output: Output) -> str:
    """host:port of the gateway to use. Blocks, and must not be called on an event loop.

    Only the gateway itself is asked: a service that is busy must not be taken for dead and replaced.
    """
    if address := configured_gateway():
        return address
    state = StackState.load(smelt_home())
    if state is not None and asyncio.run(is_healthy("gateway", state.address("gateway"))):
        return state.address("gateway")
    output.note(f"the platform does not run; starting it below {smelt_home()} (`smelt down` stops it)")
    return started(output).gateway_grpc


def started(output: Output) -> StackStatus:
    """Starts or heals the platform of this machine, saying what it does."""
    return start(smelt_home(), report=output.note)
