"""The real nats-server on a free loopback port, with JetStream in its own folder; it can be killed and come back."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_START_TIMEOUT_S: Final = 15.0
_STOP_TIMEOUT_S: Final = 10.0
_USER, _PASSWORD = "smelt", "loopback-only"


class NatsServer:
    """A nats-server process. Restarts keep port and stored data. Usable as settings for `Bus.connect`."""

    nats_user = _USER
    nats_password = _PASSWORD

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def nats_url(self) -> str:
        """Address of the server."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts the process and waits until it takes connections; RuntimeError with its log if it does not."""
        config = self._folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{self._folder / "data"}" }}\n'
            f'authorization {{ user: "{_USER}", password: "{_PASSWORD}" }}\n'
        )
        log = self._folder / "nats.log"
        self._process = subprocess.Popen(
            [str(Path(sys.executable).parent / "nats-server"), "-c", str(config), "-l", str(log)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server did not start:\n{log.read_text() if log.exists() else 'no log'}")
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends the process by SIGKILL: nothing is flushed."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ends the process in order; nothing happens if it does not run."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stops the process without ending it: connections stay open and nothing is answered."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused process go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(_STOP_TIMEOUT_S)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                return connection.recv(4) == b"INFO"
        except OSError:
            return False


@contextmanager
def nats_server() -> Iterator[NatsServer]:
    """A running server with an empty store; gone with its data afterwards."""
    with tempfile.TemporaryDirectory(prefix="nats-", ignore_cleanup_errors=True) as folder:
        server = NatsServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
