"""How the real NATS and S3 servers from wheels are started on one machine: command lines, files, ports, readiness.

Both the local stack and the tests stand on this. Every server binds loopback only, reports nothing to its vendor and
keeps its state below the folder it is given. One exception: `weed` puts empty sockets into /tmp whose place cannot be
chosen; `clear_s3_sockets` removes them after a kill.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from smeltkit import limits
from smeltkit.blobs.identities import identities
from smeltkit.errors import PortTaken, StackDown, Timeout

LOOPBACK = "127.0.0.1"
GRPC_TWIN = 10_000
"""Each HTTP port of the S3 server has a gRPC port this much higher."""
S3_PARTS = ("s3", "filer", "master", "volume", "admin")
"""What one `weed mini` process is made of; each part has a port."""
_PORT_RANGE = range(11_000, 21_900)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A user name and its secret."""

    user: str
    secret: str

    @classmethod
    def generate(cls, user: str) -> Credentials:
        """Fresh ones: 40 random hex digits."""
        return cls(user=user, secret=secrets.token_hex(20))


def find_executable(name: str) -> Path:
    """The server's executable beside this interpreter, else on the PATH; StackDown says what to install."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise StackDown(f"{name} is not installed; install the extra: pip install 'smelt[stack]'")
    return Path(found)


def is_port_free(port: int) -> bool:
    """Whether nobody listens on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int, taken: Sequence[int] = ()) -> list[int]:
    """`count` loopback ports that are free, and whose twins 10 000 higher are.

    They lie below the range the kernel gives to outgoing connections, so they are still free after a restart.
    """
    chosen: list[int] = []
    for port in random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)):
        if len(chosen) == count:
            return chosen
        if port not in taken and is_port_free(port) and is_port_free(port + GRPC_TWIN):
            chosen.append(port)
    raise PortTaken(f"fewer than {count} loopback ports are free between {_PORT_RANGE.start} and {_PORT_RANGE.stop}")


def s3_ports() -> dict[str, int]:
    """A free port for every part of the S3 server."""
    return dict(zip(S3_PARTS, free_ports(len(S3_PARTS)), strict=True))


def s3_command(
    folder: Path,
    ports: Mapping[str, int],
    credentials: Credentials,
    *,
    users: Mapping[str, Credentials] = MappingProxyType({}),
    bucket: str = "smelt",
) -> list[str]:
    """The command of `weed mini` with its state below `folder`; run it with `folder` as its working directory.

    Writes the identity file (mode 0600): without one the server would accept made-up keys. `credentials` may do all;
    `users`, by their names in `smeltkit.blobs.access`, may do in `bucket` what stands there.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    keys = {name: (given.user, given.secret) for name, given in users.items()}
    known = identities((credentials.user, credentials.secret), keys, bucket)
    write_private(folder / "identities.json", json.dumps(known))
    options = {
        "dir": "data",
        "ip": LOOPBACK,
        "ip.bind": LOOPBACK,
        "s3.config": "identities.json",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": "1024",
        "volume.max": "2000",
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "filer.localSocket": "filer.sock",
        "s3.localSocket": "s3.sock",
    }
    for part in S3_PARTS:
        options |= {f"{part}.port": str(ports[part]), f"{part}.port.grpc": str(ports[part] + GRPC_TWIN)}
    return [str(find_executable("weed")), "mini", *(f"-{name}={value}" for name, value in options.items())]


def clear_s3_sockets(ports: Mapping[str, int]) -> None:
    """Removes what a killed S3 server with these ports left in /tmp."""
    for part in S3_PARTS:
        Path(f"/tmp/seaweedfs-{part}-grpc-{ports[part] + GRPC_TWIN}.sock").unlink(missing_ok=True)


def nats_command(folder: Path, port: int, credentials: Credentials) -> list[str]:
    """The command of nats-server with JetStream below `folder`; writes its configuration (mode 0600) there."""
    folder.mkdir(parents=True, exist_ok=True)
    quoted = {
        key: json.dumps(value)
        for key, value in {
            "user": credentials.user,
            "secret": credentials.secret,
            "store": str(folder / "jetstream"),
        }.items()
    }
    write_private(
        folder / "nats.conf",
        f"host: {LOOPBACK}\nport: {port}\n"
        f"authorization {{ user: {quoted['user']}, password: {quoted['secret']} }}\n"
        f"jetstream {{ store_dir: {quoted['store']} }}\n",
    )
    return [str(find_executable("nats-server")), "--config", str(folder / "nats.conf")]


def wait_until(is_ready: Callable[[], bool], what: str, *, timeout_s: float = limits.SERVER_START_TIMEOUT_S) -> None:
    """Polls until `is_ready`; Timeout names `what`. `is_ready` may raise to end the wait at once."""
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if time.monotonic() > deadline:
            raise Timeout(f"{what} is not ready after {timeout_s:g} s")
        time.sleep(limits.SERVER_POLL_S)


def is_listening(port: int, host: str = LOOPBACK) -> bool:
    """Whether somebody accepts connections on this port of a loopback address."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def write_private(path: Path, text: str) -> None:
    """Replaces a file that only its owner may read."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)
