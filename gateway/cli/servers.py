"""NATS and the object store themselves, for commands that look after them: SMELT_PLATFORM_*, else this machine's."""

from __future__ import annotations

from gateway.cli.platform import configured_gateway
from gateway.stack.components import platform_config
from gateway.stack.state import StackState, load_credentials
from smeltkit.config import PlatformConfig, environment, from_environment, smelt_home
from smeltkit.errors import StackDown, UnsupportedOption


def servers_here(command: str) -> PlatformConfig:
    """Servers and credentials. UnsupportedOption where only the gateway of another platform is known; StackDown."""
    if "SMELT_PLATFORM_NATS_URL" in environment():
        return from_environment(PlatformConfig, "SMELT_PLATFORM_")
    if configured_gateway():
        raise UnsupportedOption(f"SMELT_GATEWAY names another platform; run `smelt {command}` where its store is")
    state = StackState.load(smelt_home())
    if state is None:
        raise StackDown(f"no platform was ever started below {smelt_home()}; start one with `smelt up`")
    return platform_config(state, load_credentials(smelt_home()))
