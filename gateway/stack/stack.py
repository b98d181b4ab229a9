"""The platform on one machine: real NATS, a real S3 server, five services and the gateway, below one folder.

`start` brings about that everything runs and is healthy, whatever state it finds: nothing, all, or half of it dead.
Each process is detached and outlives the command. Nothing is written outside of `home`, except for sockets that the S3
server puts into /tmp. One command at a time; a second one waits for the first.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.stack.components import Component, platform_config, server_components, service_components
from gateway.stack.health import is_healthy, wait_healthy, wait_writable
from gateway.stack.process import is_running, start_process, stop_processes
from gateway.stack.settings import check_settings, other_settings
from gateway.stack.state import SERVERS, SERVICES, StackState, load_credentials
from smeltkit import limits
from smeltkit.bus import topology
from smeltkit.bus.client import Bus
from smeltkit.config import PlatformConfig, environment
from smeltkit.errors import BadConfig, DiskFull, PortTaken
from smeltkit.locks import file_lock
from smeltkit.servers import clear_s3_sockets, is_port_free

Health = Literal["healthy", "unhealthy", "stopped"]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ComponentStatus:
    """One process: `pid` is 0 if it does not run."""

    name: str
    health: Health
    pid: int
    address: str
    log: Path


@dataclass(frozen=True, kw_only=True)
class StackStatus:
    """The stack below `home`. Addresses are empty if it was never started."""

    home: Path
    components: tuple[ComponentStatus, ...] = ()
    gateway_grpc: str = ""
    gateway_http: str = ""

    @property
    def is_up(self) -> bool:
        """Whether every component is healthy."""
        return bool(self.components) and all(item.health == "healthy" for item in self.components)


def start(home: Path, *, report: Report | None = None) -> StackStatus:
    """Starts what does not run, replaces what does not answer, and waits until all is healthy.

    BadConfig, before anything is started, if a service would refuse its settings. PortTaken if somebody else took a
    port meanwhile; StackDown or Timeout name the log of what did not come up.
    `report` gets a line for each thing done. Blocks; not for use on an event loop.
    """
    home = _prepared(home)
    with file_lock(home / "stack.lock", timeout_s=limits.STACK_LOCK_WAIT_S):
        state = StackState.load(home) or StackState.create()
        asyncio.run(_start(home, state, report or _ignore))
        return asyncio.run(_status(home, state))


def stop(home: Path, *, report: Report | None = None) -> None:
    """Stops everything that `start` started below `home`: the gateway first, the servers last. Data stays."""
    home = home.resolve()
    if not (home / "stack.json").exists():
        return
    with file_lock(home / "stack.lock", timeout_s=limits.STACK_LOCK_WAIT_S):
        state = StackState.load(home)
        if state is not None:
            _stop(home, state, report or _ignore)


def status(home: Path) -> StackStatus:
    """What runs below `home`, asked now. Changes nothing."""
    home = home.resolve()
    state = StackState.load(home)
    return StackStatus(home=home) if state is None else asyncio.run(_status(home, state))


async def _start(home: Path, state: StackState, report: Report) -> None:
    credentials = load_credentials(home)
    platform = platform_config(state, credentials)
    services = service_components(home, state, credentials, environment())
    servers = server_components(home, state, credentials)
    for component in services:
        check_settings(component)
    for component in (*servers, *services):
        record = state.processes.get(component.name)
        if record is None or not is_running(record):
            await _wait_ports_free(home, component)
    await _bring_up(home, state, servers, report)
    await wait_writable(platform)
    await _apply_topology(platform, report)
    await _bring_up(home, state, services, report)
    _tell_other_settings(state, services, report)


async def _bring_up(home: Path, state: StackState, components: Sequence[Component], report: Report) -> None:
    """Leaves what is healthy alone, and makes the rest so, all at a time."""
    health = await asyncio.gather(*(_settled_health(state, component.name) for component in components))
    broken = [component for component, found in zip(components, health, strict=True) if found != "healthy"]
    left = [state.processes[item.name] for item in broken if item.name in state.processes]
    silent = [component.name for component, found in zip(components, health, strict=True) if found == "unhealthy"]
    if silent:
        report(f"replacing {', '.join(silent)}: no answer within {limits.STACK_PATIENCE_S:.0f} s")
    stop_processes(left, timeout_s=limits.STACK_DRAIN_GRACE_S)
    for component in broken:
        await _wait_ports_free(home, component)
        log_path = _log_path(home, component.name)
        state.processes[component.name] = start_process(
            component.command, environment=component.environment, folder=component.folder, log_path=log_path
        )
        state.save(home)
        report(f"started {component.name} at {component.address}")
    await asyncio.gather(
        *(wait_healthy(item, state.processes[item.name], _log_path(home, item.name)) for item in broken)
    )


def _tell_other_settings(state: StackState, services: Sequence[Component], report: Report) -> None:
    """Says which processes were left alone though they were started with other settings than now."""
    for component in services:
        if found := other_settings(component, state.processes[component.name]):
            report(
                f"{component.name} runs with other settings than now ({', '.join(found)}); `smelt down`, then "
                "`smelt up`, takes the new ones"
            )


async def _apply_topology(platform: PlatformConfig, report: Report) -> None:
    bus = await Bus.connect(platform, name="stack")
    try:
        if changes := await topology.apply(bus):
            report(f"declared streams and buckets in NATS: {len(changes)} new or changed")
    finally:
        await bus.close()


def _stop(home: Path, state: StackState, report: Report) -> None:
    for names in (("gateway",), SERVICES, SERVERS):
        records = {name: state.processes[name] for name in names if name in state.processes}
        running = [name for name, record in records.items() if is_running(record)]
        stop_processes(list(records.values()))
        for name in records:
            del state.processes[name]
        state.save(home)
        if running:
            report(f"stopped {', '.join(running)}")
    clear_s3_sockets(state.ports)


async def _status(home: Path, state: StackState) -> StackStatus:
    names = (*SERVERS, *SERVICES, "gateway")
    health = await asyncio.gather(*(_health(state, name) for name in names))
    return StackStatus(
        home=home,
        gateway_grpc=state.address("gateway"),
        gateway_http=f"http://{state.address('gateway_http')}",
        components=tuple(
            ComponentStatus(
                name=name,
                health=found,
                pid=0 if found == "stopped" else state.processes[name].pid,
                address=state.address(name),
                log=_log_path(home, name),
            )
            for name, found in zip(names, health, strict=True)
        ),
    )


async def _health(state: StackState, name: str) -> Health:
    record = state.processes.get(name)
    if record is None or not is_running(record):
        return "stopped"
    return "healthy" if await is_healthy(name, state.address(name)) else "unhealthy"


async def _settled_health(state: StackState, name: str) -> Health:
    """As `_health`; what runs has STACK_PATIENCE_S to answer, for a loaded machine is no reason to stop it."""
    deadline = time.monotonic() + limits.STACK_PATIENCE_S
    found = await _health(state, name)
    while found == "unhealthy" and time.monotonic() < deadline:
        await asyncio.sleep(limits.STACK_POLL_S)
        found = await _health(state, name)
    return found


async def _wait_ports_free(home: Path, component: Component) -> None:
    """PortTaken unless all are free in a moment: the last threads of a killed process may still be leaving."""
    deadline = time.monotonic() + limits.STACK_PORT_WAIT_S
    for port in component.ports:
        while not is_port_free(port):
            if time.monotonic() > deadline:
                raise PortTaken(
                    f"port {port} of {component.name} is taken by another process; stop that one, or stop the stack "
                    f"and delete {home / 'stack.json'} to choose new ports"
                )
            await asyncio.sleep(limits.STACK_POLL_S)


def _prepared(home: Path) -> Path:
    try:
        for folder in (home, home / "logs", home / "tmp", home / "traces", home / "cache"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BadConfig(
            f"{home} cannot hold the stack: {error.strerror}; set SMELT_HOME to a folder of yours"
        ) from error
    free_bytes = shutil.disk_usage(home).free
    if free_bytes < limits.STACK_DISK_MIN_BYTES:
        raise DiskFull(
            f"only {free_bytes // limits.MIB} MiB are free at {home}, the stack needs "
            f"{limits.STACK_DISK_MIN_BYTES // limits.MIB}; free space, or set SMELT_HOME to a folder on another disk"
        )
    return home.resolve()


def _log_path(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def _ignore(_: str) -> None:
    return None
