"""One way to serve: health, reflection, guarded calls, readiness, and a drain that loses nothing.

Drain on SIGTERM or SIGINT: health turns NOT_SERVING, `on_drain` callbacks and background tasks stop taking work, then
calls under way get `drain_grace_s` to end. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from smeltkit import limits
from smeltkit.errors import BadConfig, PortTaken
from smeltkit.rpc.channel import MESSAGE_SIZE_OPTIONS
from smeltkit.rpc.interceptors import ServerGuard
from smeltkit.rpc.tls import Identity
from smeltkit.secret import Secret

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Background = Callable[[asyncio.Event], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class RpcConfig:
    """How a service is reached: prefix `SMELT_RPC_`."""

    listen: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes a free one, which the log tells."""
    reflection: bool = True
    """Whether clients may ask for the descriptors."""
    drain_grace_s: float = limits.DRAIN_GRACE_S
    """Seconds that calls under way get to end after SIGTERM."""
    token: str = field(default="", repr=False)
    """Bearer token that every caller must send; empty for none."""
    token_file: str = ""
    """File with it instead: the first line is sent, each line is accepted, read again when it changes; or empty."""
    tls_dir: str = ""
    """Folder with tls.crt, tls.key and ca.crt: calls are then encrypted, and both sides show who they are; or empty."""

    def __post_init__(self) -> None:
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise BadConfig(f"listen={self.listen!r} must be host:port with a port of 0 to 65535")
        if self.drain_grace_s < 0:
            raise BadConfig(f"drain_grace_s={self.drain_grace_s} must not be negative")

    @property
    def is_guarded(self) -> bool:
        """Whether a caller must have a token or a certificate."""
        return bool(self.token or self.token_file or self.tls_dir)

    def secret(self) -> Secret:
        """The token, from wherever it is; BadConfig if it cannot be read."""
        return Secret(self.token, file=self.token_file)

    def identity(self) -> Identity | None:
        """Who this process is to others, None without TLS; BadCertificate."""
        return Identity(self.tls_dir) if self.tls_dir else None


class ServiceHost:
    """The server of one process: add services, then `run`. Made and used on one event loop."""

    def __init__(
        self,
        name: str,
        config: RpcConfig,
        *,
        health_servicer: health.aio.HealthServicer | None = None,
        tenant_of: Callable[[str], str] | None = None,
    ) -> None:
        """`tenant_of`: whose API key a token is, "" for nobody's; the gateway alone has it."""
        self.name = name
        self.address = ""
        self._config = config
        self._identity = config.identity()
        if self._identity is not None:
            self._identity.check_name(name)
        self._guard = ServerGuard(name, config.secret(), has_callers=self._identity is not None, tenant_of=tenant_of)
        self._server = grpc.aio.server(
            interceptors=[self._guard],
            options=_server_options(),
            maximum_concurrent_rpcs=limits.CONCURRENT_CALLS_MAX,
        )
        self._services: list[str] = [""]
        self._listed = [health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._health = health_servicer or health.aio.HealthServicer()
        self._is_ready = False
        self._health_updates: set[asyncio.Task[None]] = set()
        self._drain_callbacks: list[Callable[[], Awaitable[None]]] = []

    def add(
        self, descriptor_name: str, add_to_server: Callable[[Any, grpc.aio.Server], None], servicer: object
    ) -> None:
        """Serves `servicer` under the full name of its service, e.g. smelt.importer.v1.ImporterService."""
        add_to_server(servicer, self._server)
        self._services.append(descriptor_name)
        self._listed.append(descriptor_name)

    def add_generic(self, handler: grpc.GenericRpcHandler, *descriptor_names: str) -> None:
        """Serves what `handler` knows, for whoever passes calls on; reflection lists `descriptor_names`."""
        self._server.add_generic_rpc_handlers((handler,))
        self._listed += descriptor_names

    def set_ready(self, is_ready: bool) -> None:
        """Sets the health of the process and of every service of it; it starts as not ready."""
        self._is_ready = is_ready
        if self.address:
            update = asyncio.get_running_loop().create_task(self._publish_health())
            self._health_updates.add(update)
            update.add_done_callback(self._health_updates.discard)

    def on_drain(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Calls `callback` when the drain begins, after health turned NOT_SERVING."""
        self._drain_callbacks.append(callback)

    async def start(self) -> None:
        """Binds and serves; PortTaken if somebody listens there already."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.reflection:
            reflection.enable_server_reflection(self._listed, self._server)
        try:
            port = self._bind()
        except RuntimeError as error:
            raise PortTaken(
                f"cannot listen on {self._config.listen}: in use or not ours; free it or choose another"
            ) from error
        await self._publish_health()
        await self._server.start()
        self.address = f"{self._config.listen.rpartition(':')[0]}:{port}"
        _LOG.info("serving", extra={"address": self.address, "services": self._services[1:]})

    def _bind(self) -> int:
        if self._identity is None:
            return self._server.add_insecure_port(self._config.listen)
        return self._server.add_secure_port(self._config.listen, self._identity.server_credentials())

    async def stop(self) -> None:
        """Drains: not ready, nothing new, calls under way end or are cut after the grace."""
        await self._health.enter_graceful_shutdown()
        for callback in self._drain_callbacks:
            await callback()
        await self._server.stop(self._config.drain_grace_s)
        if self._guard.calls:
            # stop() does not wait for handlers whose client has left (grpc/grpc#37239).
            await asyncio.wait(self._guard.calls, timeout=self._config.drain_grace_s)
        _LOG.info("stopped", extra={"address": self.address})

    async def run(self, *background: Background) -> None:
        """Serves until SIGTERM or SIGINT, with `background` tasks that end when their event is set.

        A background task that fails drains the process too, and its error is raised afterwards.
        """
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, stopping)
        await self.start()
        tasks = [asyncio.ensure_future(work(stopping)) for work in background]
        for task in tasks:
            task.add_done_callback(lambda done: stopping.set() if _has_failed(done) else None)
        try:
            await stopping.wait()
        finally:
            stopping.set()
            await self.stop()
            await _finish(tasks, self._config.drain_grace_s)

    def _on_signal(self, stopping: asyncio.Event) -> None:
        stopping.set()
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def _publish_health(self) -> None:
        answer = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._health.set(service, answer.SERVING if self._is_ready else answer.NOT_SERVING)


def _server_options() -> list[tuple[str, int]]:
    return [
        *MESSAGE_SIZE_OPTIONS,
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.KEEPALIVE_MIN_RECV_S * 1000)),
        ("grpc.max_connection_age_ms", int(limits.CONNECTION_AGE_MAX_S * 1000)),
        ("grpc.max_connection_age_grace_ms", int(limits.CALL_TIMEOUT_MAX_S * 1000)),
    ]


async def _finish(tasks: Sequence[asyncio.Future[None]], grace_s: float) -> None:
    """Waits for the tasks, cancels what is left after the grace, and raises the first error among them."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=grace_s)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for error in (result for result in results if isinstance(result, Exception)):
        raise error


def _has_failed(task: asyncio.Future[None]) -> bool:
    return not task.cancelled() and task.exception() is not None
