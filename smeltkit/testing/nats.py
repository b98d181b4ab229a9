"""The real nats-server on loopback, with JetStream in its own folder: killed, paused and started again at will."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from smeltkit import limits, servers
from smeltkit.config import PlatformConfig
from smeltkit.errors import StackDown


class NatsServer:
    """One server with its state in `folder`. Restarts keep port, credentials and whatever was stored."""

    def __init__(self, folder: Path, *, address: str = "") -> None:
        """`address` is host:port, a free loopback port if empty."""
        self.address = address or f"{servers.LOOPBACK}:{servers.free_ports(1)[0]}"
        self._folder = folder
        self._credentials = servers.Credentials.generate("smelt-test")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address with credentials, e.g. nats://user:secret@127.0.0.1:12345."""
        return f"nats://{self._credentials.user}:{self._credentials.secret}@{self.address}"

    @property
    def config(self) -> PlatformConfig:
        """Settings that reach this server; the object store is left out."""
        return PlatformConfig(nats_url=self.url, s3_endpoint="", s3_access_key="", s3_secret_key="")

    def start(self) -> None:
        """Starts the server and waits until it takes connections."""
        assert self._process is None, "already running"
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), env=self._environment(), stdout=log, stderr=log, start_new_session=True
            )
        servers.wait_until(self._is_up, "nats-server")

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ends the server in order."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Halts the server: connections stay open, and nothing is answered."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a halted server go on."""
        assert self._process is not None, "not running"
        self._process.send_signal(signal.SIGCONT)

    def _command(self) -> list[str]:
        return servers.nats_command(self._folder, int(self.address.rpartition(":")[2]), self._credentials)

    def _environment(self) -> Mapping[str, str] | None:
        return None

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(limits.SERVER_START_TIMEOUT_S)

    def _is_up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise StackDown(f"nats-server ended with {self._process.returncode}; see {self._folder / 'server.log'}")
        host, _, port = self.address.rpartition(":")
        return servers.is_listening(int(port), host)


@contextmanager
def nats_server() -> Iterator[NatsServer]:
    """A running server in a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="smelt-nats-", ignore_cleanup_errors=True) as folder:
        server = NatsServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()
