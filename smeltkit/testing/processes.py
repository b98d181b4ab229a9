"""Services and the gateway as real processes for tests, on a free loopback port, killed at the end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from smeltkit.config import environment
from smeltkit.servers import free_ports

_START_TIMEOUT_S: Final = 120.0


class ServiceProcess:
    """One process of a service; killed and started again at will, always at the same address."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str],
        log: Path,
        *,
        address: str = "",
        arguments: Sequence[str] = (),
        root: Path | None = None,
    ) -> None:
        """`address` is host:port, a free loopback port if empty; `arguments` are Python's, empty for the service.

        `root` is the checkout of another release that it stands on.
        """
        self.address = address or f"127.0.0.1:{free_ports(1)[0]}"
        self.name, self._log = name, log
        self._arguments = tuple(arguments) or ("-m", name if name == "gateway" else f"services.{name}")
        self._root, self.folder = root, log.parent
        self._settings = environment({**settings, "SMELT_RPC_LISTEN": self.address})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process and waits until it is healthy; RuntimeError with its log if it does not become so."""
        self.launch()
        self.wait_healthy()

    def launch(self) -> None:
        """Starts the process and waits for nothing."""
        assert self._process is None, f"{self.name} runs already"
        with self._log.open("ab") as log:
            command = [sys.executable, *self._arguments]
            paths = {"PYTHONPATH": f"{self._root}:{self._root / 'proto' / 'python'}"} if self._root else {}
            self._process = subprocess.Popen(
                command, cwd=self._root, env=self._settings | paths, stdout=log, stderr=log
            )

    def wait_healthy(self) -> None:
        """Returns once the process is healthy; RuntimeError with its log if it does not become so."""
        assert self._process is not None, f"{self.name} does not run"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not become healthy:\n{self.log}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends the process by SIGKILL; nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def terminate(self) -> int:
        """Asks the process to end by SIGTERM and waits until it has; its exit code."""
        process, self._process = self._process, None
        assert process is not None, f"{self.name} does not run"
        process.terminate()
        return process.wait(_START_TIMEOUT_S)

    @property
    def log(self) -> str:
        """What the process wrote so far."""
        return self._log.read_text(errors="replace")

    def _is_healthy(self) -> bool:
        with grpc.insecure_channel(self.address) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def service_process(name: str, settings: Mapping[str, str], folder: Path) -> Iterator[ServiceProcess]:
    """A running, healthy service with these environment settings; its log lies in `folder`."""
    process = ServiceProcess(name, settings, folder / f"{name}.log")
    try:
        process.start()
        yield process
    finally:
        process.kill()
