"""Certificates of one process: who it is to the others, checked at start as they will check it, read again on rotation.

A folder holds `tls.crt` (the certificate, then what it was issued by), `tls.key` and `ca.crt`, as cert-manager writes
them. The DNS name in the certificate is the name of the service. Both sides of a connection show one, and a caller
names whom it means, so neither address nor network decides who is who.

New files are taken for connections made after they were written; connections that are open live on until their age ends
them. Files that do not fit together, e.g. half of a rotation, are left aside with a warning. Not checked: revocation;
give certificates short lives. Who has a service's key is that service, so keys are readable by their process only.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc

from smeltkit import limits
from smeltkit.errors import BadCertificate
from smeltkit.rpc.methods import MethodChannel

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"
_LOG = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class _Material:
    """Bytes of the three files, and the names that the certificate gives."""

    certificate: bytes
    key: bytes
    authority: bytes
    names: tuple[str, ...]


class Identity:
    """The certificate of this process. BadCertificate if it is not one that the others would accept."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._stamp = self._look()
        self._material = self._load()

    @property
    def names(self) -> tuple[str, ...]:
        """What the certificate says that this process is."""
        return self._material.names

    def check_name(self, service: str) -> None:
        """BadCertificate unless the certificate is that of `service`."""
        if service not in self.names:
            raise BadCertificate(
                f"the certificate in {self._folder} is that of {', '.join(self.names)}, not of {service}; "
                f"issue one whose DNS name is {service}"
            )

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials with which a server shows its certificate and asks every caller for one."""
        shown = self._material

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            if self.refreshed() is shown:
                return None
            shown = self._material
            return _server_configuration(shown)

        start = _server_configuration(shown)
        return grpc.dynamic_ssl_server_credentials(start, fetch, True)  # type: ignore[arg-type]  # None is no change

    def channel(self, open_with: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> grpc.aio.Channel:
        """What `open_with` makes, made anew whenever the certificate was replaced."""
        return cast(grpc.aio.Channel, _RenewedChannel(self, open_with))

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a caller, as the files are now."""
        found = self.refreshed()
        return grpc.ssl_channel_credentials(found.authority, found.key, found.certificate)

    def refreshed(self) -> _Material:
        """What the files hold by now, the same object while they are the same; what they held, if they do not fit."""
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._material = self._load()
                _LOG.info("certificate was read again", extra={"folder": str(self._folder)})
        except BadCertificate as error:
            _LOG.warning("the certificate in use is kept: %s", error)
        return self._material

    def _look(self) -> _Stamp:
        """What changes when a file is replaced, also behind a link."""
        try:
            found = [(self._folder / name).stat() for name in (CERTIFICATE, KEY, AUTHORITY)]
        except OSError as error:
            raise self._unreadable(error) from error
        return tuple((item.st_ino, item.st_mtime_ns, item.st_size) for item in found)

    def _load(self) -> _Material:
        paths = [self._folder / name for name in (CERTIFICATE, KEY, AUTHORITY)]
        try:
            certificate, key, authority = (path.read_bytes() for path in paths)
            names = _names_as_seen_by_others(*paths)
        except ssl.SSLError as error:
            what = getattr(error, "verify_message", "") or getattr(error, "reason", "") or error.args[-1]
            raise BadCertificate(
                f"the certificate in {self._folder} would be refused: {what}; {CERTIFICATE} must belong to {KEY}, "
                f"be issued by {AUTHORITY} for server and client use, and be valid today"
            ) from error
        except OSError as error:
            raise self._unreadable(error) from error
        return _Material(certificate=certificate, key=key, authority=authority, names=names)

    def _unreadable(self, error: OSError) -> BadCertificate:
        return BadCertificate(
            f"{error.filename}: {error.strerror}; SMELT_RPC_TLS_DIR must name a folder with {CERTIFICATE}, {KEY} and "
            f"{AUTHORITY} that this process may read, or be empty for no TLS"
        )


class _RenewedChannel(MethodChannel):
    """As much of a channel as stubs use. A call that is under way ends on the channel that it began on."""

    def __init__(self, identity: Identity, open_with: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> None:
        self._identity, self._open_with = identity, open_with
        self._material = identity.refreshed()
        self._current = open_with(identity.channel_credentials())
        self._endings: set[asyncio.Task[None]] = set()

    def _method(self, kind: str, method: str, codec: tuple[Any, ...], options: dict[str, Any]) -> _RenewedMethod:
        return _RenewedMethod(self, kind, method, codec, options)

    async def __aenter__(self) -> _RenewedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for ending in self._endings:
            ending.cancel()
        await self._current.close(grace)

    def current(self) -> grpc.aio.Channel:
        if (found := self._identity.refreshed()) is not self._material:
            self._material, old = found, self._current
            self._current = self._open_with(self._identity.channel_credentials())
            ending = asyncio.get_running_loop().create_task(old.close(limits.CALL_TIMEOUT_MAX_S))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
        return self._current

    def __getattr__(self, name: str) -> Any:
        return getattr(self._current, name)


class _RenewedMethod:
    def __init__(
        self, channel: _RenewedChannel, kind: str, method: str, codec: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._channel, self._kind, self._codec, self._options = channel, kind, codec, options
        self._method = method.encode()

    def __call__(self, *args: Any, **options: Any) -> Any:
        make = getattr(self._channel.current(), self._kind)
        return make(self._method.decode(), *self._codec, **self._options)(*args, **options)


def _server_configuration(material: _Material) -> grpc.ServerCertificateConfiguration:
    pairs = [(material.key, material.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, material.authority)


def _names_as_seen_by_others(certificate: Path, key: Path, authority: Path) -> tuple[str, ...]:
    """DNS names of the certificate, after a handshake with itself in memory; ssl.SSLError if either side refuses."""
    serving, calling = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.check_hostname = False
    for context in (serving, calling):
        context.load_cert_chain(certificate, key, password=_no_password)
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = serving.wrap_bio(to_server, to_client, server_side=True)
    client = calling.wrap_bio(to_client, to_server)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    found: Any = client.getpeercert() or {}
    return tuple(str(name) for kind, name in found.get("subjectAltName", ()) if kind == "DNS")


def _no_password() -> str:
    raise ssl.SSLError(0, "the key is encrypted; store it in the clear, readable by this process only")
