"""Real S3 servers of two makes for tests, on loopback: killed and started again at will, gone at the end."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from smeltkit import limits, servers
from smeltkit.blobs.access import MAY
from smeltkit.blobs.s3 import S3Store
from smeltkit.config import PlatformConfig
from smeltkit.errors import StackDown

Make = Literal["seaweedfs", "rclone"]


class S3Server:
    """One server with its state in `folder`. Restarts keep ports, credentials and objects."""

    def __init__(self, folder: Path, make: Make = "seaweedfs", *, bucket: str = "smelt-tests") -> None:
        """`bucket` is the one in which `smeltkit.blobs.access` says what its users may do."""
        self.folder, self._make, self._bucket = folder, make, bucket
        self._ports = servers.s3_ports()
        self._credentials = servers.Credentials.generate("smelt-test")
        self._users = {user: servers.Credentials.generate(user) for user in MAY}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> PlatformConfig:
        """Settings that reach this server; NATS is left out."""
        return PlatformConfig(
            nats_url="",
            s3_endpoint=f"{servers.LOOPBACK}:{self._ports['s3']}",
            s3_access_key=self._credentials.user,
            s3_secret_key=self._credentials.secret,
            s3_bucket=self._bucket,
        )

    def config_of(self, user: str) -> PlatformConfig:
        """The same with the key of `user`, who may do in this bucket what `smeltkit.blobs.access` says (SeaweedFS)."""
        keys = self._users[user]
        return replace(self.config, s3_access_key=keys.user, s3_secret_key=keys.secret)

    def start(self) -> None:
        """Starts the server and waits until it takes a write."""
        assert self._process is None, "already running"
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": os.defpath, "HOME": str(self.folder)},
            )
        store = S3Store(self.config)
        servers.wait_until(lambda: self._takes_writes(store), f"the S3 server ({self._make})")

    def kill(self) -> None:
        """Ends the server as a crash would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            servers.clear_s3_sockets(self._ports)

    def _command(self) -> list[str]:
        if self._make == "seaweedfs":
            return servers.s3_command(
                self.folder, self._ports, self._credentials, users=self._users, bucket=self.config.s3_bucket
            )
        (self.folder / "data").mkdir(exist_ok=True)
        return [
            str(servers.find_executable("rclone")),
            "serve",
            "s3",
            "--config",
            os.devnull,
            "--addr",
            self.config.s3_endpoint,
            "--auth-key",
            f"{self._credentials.user},{self._credentials.secret}",
            str(self.folder / "data"),
        ]

    def _takes_writes(self, store: S3Store) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise StackDown(f"the S3 server ended with {self._process.returncode}; see {self.folder / 'server.log'}")
        return servers.is_listening(self._ports["s3"]) and store.takes_writes()


@contextmanager
def s3_server(make: Make = "seaweedfs") -> Iterator[S3Server]:
    """A running server in a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="smelt-s3-", ignore_cleanup_errors=True) as folder:
        server = S3Server(Path(folder), make)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def fresh_store(server: S3Server, state_folder: Path, *, part_bytes: int = limits.PART_BYTES) -> S3Store:
    """A store in a new, empty bucket of the server."""
    config = replace(server.config, s3_bucket=f"test-{secrets.token_hex(6)}")
    store = S3Store(config, state_folder=state_folder, part_bytes=part_bytes)
    store.ensure_bucket()
    return store
