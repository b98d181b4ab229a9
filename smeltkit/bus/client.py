"""One connection to NATS that comes back by itself, and one rule for what happens while it is away.

Every request runs through `Bus.call`: it is repeated until it is answered or patience is at an end, then the caller
gets BusUnavailable. Once NATS has been away for that long, further calls fail at once. Patience is
BUS_REQUEST_TIMEOUT_S with one server, and BUS_ELECTION_TIMEOUT_S in a cluster: there the loss of a server is an
election, and no outage.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import nats.errors
import nats.js.errors
from google.protobuf.message import Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from smeltkit import limits
from smeltkit.bus import consumer, publisher
from smeltkit.bus.kv import Bucket, NatsBucket
from smeltkit.bus.subjects import inbox_of
from smeltkit.config import PlatformConfig
from smeltkit.errors import BadCertificate, BusUnavailable
from smeltkit.secret import Secret
from smeltkit.telemetry.failures import counted

T = TypeVar("T")
_log = logging.getLogger(__name__)
_TRANSIENT = (
    OSError,
    TimeoutError,
    nats.errors.TimeoutError,
    nats.errors.NoRespondersError,
    nats.errors.ConnectionClosedError,
    nats.errors.ConnectionReconnectingError,
    nats.errors.ConnectionDrainingError,
    nats.errors.OutboundBufferLimitError,
    nats.errors.StaleConnectionError,
    nats.errors.NoServersError,
    nats.errors.AuthorizationError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
    nats.js.errors.ServerError,
)


class Bus:
    """A connection to NATS: publishes facts, opens buckets and work queues. Made by `connect`, ended by `close`."""

    def __init__(self, *, copies: int = 1) -> None:
        self._client = Client()
        self._copies = copies
        self._patience_s = limits.BUS_ELECTION_TIMEOUT_S if copies > 1 else limits.BUS_REQUEST_TIMEOUT_S
        self._connected = asyncio.Event()
        self._away_since = time.monotonic()
        self.jetstream: JetStreamContext = self._client.jetstream(timeout=limits.BUS_ATTEMPT_TIMEOUT_S)

    @classmethod
    async def connect(cls, config: PlatformConfig, *, name: str) -> Bus:
        """A connected bus; BusUnavailable if NATS does not answer within BUS_CONNECT_TIMEOUT_S.

        Once connected it reconnects for ever. `name` is what NATS shows for the connection.
        """
        bus = cls(copies=config.nats_replicas)
        try:
            async with asyncio.timeout(limits.BUS_CONNECT_TIMEOUT_S):
                await bus._open(config, name)
        except (TimeoutError, OSError, nats.errors.Error) as error:
            cause = bus._client.last_error or error
            await bus.close()
            if isinstance(cause, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
                raise BadCertificate(
                    f"NATS at {_without_secret(config.nats_url)} does not speak TLS from the first byte; leave"
                    " SMELT_PLATFORM_NATS_CA_FILE empty, or give the server tls { handshake_first: true }"
                ) from error
            if isinstance(cause, ssl.SSLError):
                raise BadCertificate(
                    f"NATS at {_without_secret(config.nats_url)} shows no certificate that is trusted here: {cause};"
                    f" one of the authorities in {config.nats_ca_file} must have issued it, for the host in the address"
                ) from error
            where = f"NATS at {_without_secret(config.nats_url)}"
            if "authorization" in str(cause).lower():
                raise BusUnavailable(
                    f"{where} refuses these credentials; check SMELT_PLATFORM_NATS_USER and its password"
                ) from error
            raise BusUnavailable(
                f"{where} does not answer within {limits.BUS_CONNECT_TIMEOUT_S:g} s ({type(cause).__name__});"
                " start the platform (`smelt up`), or check the address"
            ) from error
        return bus

    async def _open(self, config: PlatformConfig, name: str) -> None:
        async def on_error(error: Exception) -> None:
            _log.debug("nats: %s: %s", type(error).__name__, error)

        async def on_away() -> None:
            self._connected.clear()
            self._away_since = time.monotonic()
            if not self._client.is_closed:
                _log.warning("NATS is away")

        async def on_back() -> None:
            self._connected.set()
            _log.info("NATS is back")

        await self._client.connect(
            config.nats_url.split(","),
            name=name,
            user=config.nats_user or None,
            password=_password(config),
            tls=_encryption(config),
            # The server's greeting could be forged into one without TLS, and the password would follow in clear.
            tls_handshake_first=bool(config.nats_ca_file),
            inbox_prefix=inbox_of(config.nats_user),
            error_cb=on_error,
            disconnected_cb=on_away,
            reconnected_cb=on_back,
            max_reconnect_attempts=-1,
            reconnect_time_wait=limits.BUS_RECONNECT_WAIT_S,  # type: ignore[arg-type]  # used as seconds, annotated int
            connect_timeout=int(limits.BUS_ATTEMPT_TIMEOUT_S),
            ping_interval=5,
            max_outstanding_pings=2,
        )
        self._connected.set()

    @property
    def is_connected(self) -> bool:
        """Whether NATS answers at this moment, as far as the connection knows."""
        return self._connected.is_set()

    async def close(self) -> None:
        """Ends the connection; what was published before is sent first, within BUS_CLOSE_TIMEOUT_S."""
        try:
            async with asyncio.timeout(limits.BUS_CLOSE_TIMEOUT_S):
                if self._connected.is_set():
                    await self._client.flush()
                await self._client.close()
        except (TimeoutError, OSError, nats.errors.Error) as error:
            _log.debug("closing NATS: %s", error)
        self._connected.clear()

    async def publish(
        self, subject: str, body: bytes, *, message_id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        """Stores `body` once under `message_id`; the stream sequence is returned."""
        return await publisher.publish(self, subject, body, message_id=message_id, headers=headers)

    async def publish_event(self, subject: str, message: Message) -> None:
        """Publishes one fact: `importer.bundle.stored` goes to `smelt.evt.importer.bundle.stored.default`."""
        await publisher.publish_event(self, subject, message)

    def bucket(self, name: str) -> Bucket:
        """The key-value bucket `name`; it must exist in the topology."""
        return NatsBucket(self, name)

    def queue(self, service: str) -> consumer.WorkQueue:
        """The work queue of `service`; its durable must exist in the topology."""
        return consumer.WorkQueue(self, service)

    async def is_queue_empty(self, service: str) -> bool:
        """Whether nothing waits in the work queue of `service` and nothing is in the hands of its workers."""
        return await consumer.is_queue_empty(self, service)

    @asynccontextmanager
    async def listen(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> AsyncIterator[None]:
        """Calls `callback` for every message on `subject` while the context lasts; at most once, nothing is stored."""
        subscription = await self.call("subscribing", lambda: self._client.subscribe(subject, cb=callback))
        try:
            yield
        finally:
            try:
                await subscription.unsubscribe()
            except nats.errors.Error as error:
                _log.debug("unsubscribing: %s", error)

    async def call(self, what: str, action: Callable[[], Awaitable[T]]) -> T:
        """The outcome of `action`, repeated while NATS does not answer; BusUnavailable names `what` when time is up."""
        deadline = time.monotonic() + self._patience_s
        while True:
            cause: Exception
            try:
                await self._wait_connected(deadline)
                async with asyncio.timeout(max(deadline - time.monotonic(), limits.BUS_RETRY_PAUSE_S)):
                    return await action()
            except _TRANSIENT as error:
                cause = error
            except nats.errors.Error as error:
                remedy = "run python -m smeltkit.bus.topology"
                raise counted(BusUnavailable(f"{what}: NATS refuses: {error}; {remedy}")) from error
            if not self.is_connected or time.monotonic() + limits.BUS_RETRY_PAUSE_S >= deadline:
                break
            await asyncio.sleep(limits.BUS_RETRY_PAUSE_S)
        told = f"{what}: NATS does not answer ({type(cause).__name__}); {self._remedy(cause)}"
        raise counted(BusUnavailable(told)) from cause

    def _remedy(self, cause: Exception) -> str:
        """What to do when patience is at an end: a cluster's node that is met but has no quorum says nothing itself."""
        if self._copies > 1 and self.is_connected:
            return (
                f"{self._copies // 2 + 1} of {self._copies} nodes of the NATS cluster must run and meet each other;"
                " if they do, run python -m smeltkit.bus.topology"
            )
        is_missing = isinstance(cause, nats.js.errors.NoStreamResponseError | nats.errors.NoRespondersError)
        return "run python -m smeltkit.bus.topology" if is_missing else "start the platform, or try again"

    async def _wait_connected(self, deadline: float) -> None:
        if self._connected.is_set():
            return
        patience_s = min(deadline, self._away_since + self._patience_s) - time.monotonic()
        if patience_s <= 0:
            raise nats.errors.ConnectionReconnectingError
        async with asyncio.timeout(patience_s):
            await self._connected.wait()


def _password(config: PlatformConfig) -> Callable[[], str] | None:
    """The password at each connection: a file may hold another by then."""
    secret = Secret(config.nats_password, file=config.nats_password_file)
    return secret if secret else None


def _encryption(config: PlatformConfig) -> ssl.SSLContext | None:
    """How connections are encrypted; None for not at all. BadCertificate if the file holds no authority."""
    if not config.nats_ca_file:
        return None
    try:
        return ssl.create_default_context(cafile=config.nats_ca_file)
    except (OSError, ssl.SSLError) as error:
        raise BadCertificate(
            f"nats_ca_file {config.nats_ca_file}: {error}; it must hold certificates of authorities as PEM"
        ) from error


def _without_secret(urls: str) -> str:
    """`urls` fit for a message: nothing before an `@` is shown."""
    return ",".join(url.rsplit("@", 1)[-1] for url in urls.split(","))
