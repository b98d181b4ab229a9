"""Which replicas there are: those listed, and whatever the listed names mean at present."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Collection, Coroutine
from typing import Any

import grpc

from smeltkit import limits
from smeltkit.errors import BadConfig, NoReplica
from smeltkit.routing.choice import choose, to_warm
from smeltkit.routing.demand import Demand
from smeltkit.routing.replica import Replica
from smeltkit.telemetry import gauge, names

_LOG = logging.getLogger(__name__)
_DNS = "dns:///"


class Pool:
    """The replicas behind `addresses`: host:port, several separated by commas; names are looked up again and again.

    `open_channel(address)` opens a channel to one replica. `start_s` is how long a request waits where none runs: one
    may be started because it waits.
    """

    def __init__(
        self, addresses: str, open_channel: Callable[[str], grpc.aio.Channel], *, start_s: float = 0.0
    ) -> None:
        self._start_s = start_s
        self._targets = [_parse(part) for part in addresses.split(",")]
        self._open_channel = open_channel
        self._found: dict[tuple[str, int], list[str]] = {}
        self._replicas: dict[str, Replica] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Looks all names up once, and goes on doing so."""
        await self._resolve()
        if not all(_is_literal(host) for host, _ in self._targets):
            self._keep(self._keep_resolving())

    async def close(self) -> None:
        """Closes all channels, and with them what is under way."""
        for task in self._tasks:
            task.cancel()
        for replica in self._replicas.values():
            await replica.close()

    def has_others(self, excluded: Collection[Replica]) -> bool:
        """Whether a replica beside those takes requests now."""
        return any(replica not in excluded for replica in self.serving())

    def serving(self) -> list[Replica]:
        """The replicas that take requests now."""
        return [replica for replica in self._replicas.values() if replica.is_serving]

    async def pick(self, demand: Demand, excluded: Collection[Replica] = ()) -> Replica:
        """The replica for a request, waited for if none serves; NoReplica tells what each of them says."""
        return self._choose(demand, excluded) or await self._wait(demand, excluded)

    async def _wait(self, demand: Demand, excluded: Collection[Replica]) -> Replica:
        """As `pick`. Who names a model is counted while it waits, so that a replica is started where none runs."""
        is_work, loop = bool(demand.model), asyncio.get_running_loop()
        began, wait_s = loop.time(), max(self._start_s if is_work else 0.0, limits.ROUTE_WAIT_S)
        gauge(names.ROUTE_WAITING).add(is_work)
        try:
            while True:
                are_known = all(replica.is_known for replica in self._replicas.values() if replica not in excluded)
                left_s = began + (wait_s if are_known else max(wait_s, limits.CONNECT_TIMEOUT_S)) - loop.time()
                self._changed.clear()
                await asyncio.wait_for(self._changed.wait(), left_s)
                if (chosen := self._choose(demand, excluded)) is not None:
                    return chosen
        except TimeoutError:
            raise NoReplica(self._explain(), retry_after_s=limits.ROUTE_RECHECK_MAX_S) from None
        finally:
            gauge(names.ROUTE_WAITING).add(-is_work)

    def _choose(self, demand: Demand, excluded: Collection[Replica]) -> Replica | None:
        replicas = [replica for replica in self._replicas.values() if replica not in excluded]
        chosen = choose(replicas, demand)
        if chosen is not None and (idle := to_warm(replicas, demand)) is not None:
            idle.warm(demand.model)
        return chosen

    def _explain(self) -> str:
        names = ", ".join(f"{host}:{port}" for host, port in self._targets)
        said = "; ".join(f"{replica.address} {replica.refusal}" for replica in self._replicas.values())
        return (
            f"no inference replica takes requests: {said or f'{names} means no address'}; start one or see why in its"
            " log, then try again"
        )

    async def _keep_resolving(self) -> None:
        while True:
            await asyncio.sleep(limits.ROUTE_RESOLVE_PERIOD_S)
            await self._resolve()

    async def _resolve(self) -> None:
        """Takes in what the names mean now; one that cannot be looked up means what it meant."""
        for host, port in self._targets:
            try:
                self._found[host, port] = await _lookup(host, port)
            except OSError as error:
                _LOG.info("%s cannot be looked up: %s", host, error)
        wanted = {address for addresses in self._found.values() for address in addresses}
        for address in self._replicas.keys() - wanted:
            self._keep(self._replicas.pop(address).retire())
        for address in wanted - self._replicas.keys():
            self._replicas[address] = Replica(address, self._open_channel(address), self._changed.set)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _parse(part: str) -> tuple[str, int]:
    host, _, port = part.strip().removeprefix(_DNS).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadConfig(f"{part!r} is no address of a replica; give host:port, several separated by commas")
    return host, int(port)


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


async def _lookup(host: str, port: int) -> list[str]:
    """Addresses as ip:port; of one family, since both may lead to the same process."""
    if _is_literal(host):
        return [f"{host}:{port}"]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    plain = {f"{entry[4][0]}:{port}" for entry in found if entry[0] == socket.AF_INET}
    return sorted(plain or {f"[{entry[4][0]}]:{port}" for entry in found})
