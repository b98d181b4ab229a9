"""The NATS cluster of the manifests as three real servers: their own configuration files, on loopback addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scripts.cluster.declared import Overlay
from scripts.cluster.places import Places
from smeltkit import servers
from smeltkit.testing.nats import NatsServer

NODES = 3
CLIENT_PORT = 4222


class NatsNode(NatsServer):
    """One server of the cluster; it may be killed and started again like any other."""

    def __init__(self, folder: Path, name: str, ip: str, files: Mapping[str, str], settings: Mapping[str, str]) -> None:
        super().__init__(folder, address=f"{ip}:{CLIENT_PORT}")
        self.name = name
        self._settings = settings
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(_placed(text, ip, folder))

    def _command(self) -> list[str]:
        server = str(servers.find_executable("nats-server"))
        return [server, "--config", str(self._folder / "nats.conf"), "--name", self.name]

    def _environment(self) -> Mapping[str, str]:
        return self._settings


@contextmanager
def nats_nodes(overlay: Overlay, places: Places, folder: Path) -> Iterator[Sequence[NatsNode]]:
    """Three running servers that know each other, with their state below `folder`."""
    with ExitStack() as stack:
        nodes = []
        for index in range(NODES):
            settings = places.translated(overlay.environment("nats"), "nats", index)
            ip, name = places.ip("nats", index), f"nats-{index}"
            nodes.append(NatsNode(folder / name, name, ip, overlay.files("nats"), settings))
            stack.callback(nodes[-1].kill)
            nodes[-1].start()
        yield nodes


def _placed(text: str, ip: str, folder: Path) -> str:
    """The configuration on this machine: an address beside each port, folders of its own.

    Clients are told no other addresses than their settings name: some meet the servers through links that can be cut.
    """
    text = re.sub(r"^port: ", f"host: {ip}\nport: ", text, flags=re.MULTILINE)
    text = re.sub(r"^  port: ", f"  host: {ip}\n  no_advertise: true\n  port: ", text, flags=re.MULTILINE)
    return text.replace("/run/nats", str(folder)).replace("store_dir: /data", f"store_dir: {folder}/data")
