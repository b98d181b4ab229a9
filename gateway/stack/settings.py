"""What a process of the stack would refuse in its settings, before it is started; and what differs while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from gateway.config import GatewayConfig
from gateway.http.config import HttpConfig
from gateway.stack.components import Component
from gateway.stack.process import ProcessRecord
from gateway.stack.state import S3_USERS
from gateway.tenants.keys import ApiKeys
from smeltkit.config import PlatformConfig, from_environment
from smeltkit.rpc.server import RpcConfig
from smeltkit.telemetry.setup import TelemetryConfig

_UNREAD = frozenset({"PATH"})
"""Variables that differ from shell to shell and change nothing."""


def check_settings(component: Component) -> None:
    """Returns if the service or gateway would take its settings and the files that they name; else its error."""
    for prefix, config in _read_by(component.name):
        found = from_environment(config, prefix, component.environment)
        if isinstance(found, RpcConfig):
            found.secret()
            found.identity()
        elif isinstance(found, HttpConfig):
            ApiKeys.from_file(found.api_keys_file)


def other_settings(component: Component, record: ProcessRecord) -> list[str]:
    """Variables that the running process was started without, or with another value; none where it cannot be seen."""
    try:
        given = Path(f"/proc/{record.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    pairs = (entry.decode(errors="surrogateescape").partition("=") for entry in given if entry)
    running = {name: value for name, _, value in pairs}
    names = (set(running) | set(component.environment)) - _UNREAD
    return sorted(name for name in names if running.get(name) != component.environment.get(name))


def _read_by(name: str) -> Iterator[tuple[str, type[Any]]]:
    """Prefix and class of what the process reads. A service keeps its own as <Name>Config in its config module."""
    yield "SMELT_RPC_", RpcConfig
    yield "SMELT_TELEMETRY_", TelemetryConfig
    if name in S3_USERS:
        yield "SMELT_PLATFORM_", PlatformConfig
    if name == "gateway":
        yield "SMELT_GATEWAY_", GatewayConfig
        yield "SMELT_HTTP_", HttpConfig
    else:
        own = import_module(f"services.{name}.config")
        yield f"SMELT_{name.upper()}_", getattr(own, f"{name.capitalize()}Config")
