"""Where each pod is: its own loopback address, at the ports of the manifests. Names in settings become addresses."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Mapping

from smeltkit.errors import PortTaken

_FIRST = {
    "nats": 10,
    "inference": 20,
    "evaluator": 30,
    "sandbox": 40,
    "gateway": 50,
    "importer": 60,
    "trainer": 70,
    "topology": 80,
}
"""Last number of the address of each workload's first pod; others follow."""
_LINKS = 100
_UIDS, _BLOCK_UIDS, _POD_UIDS = 0x71000000, 16384, 4096
_NAME = re.compile(r"(?:dns:///)?(?:(\w+)-(\d+)\.)?([\w-]+)\.[\w-]+\.svc:(\d+)")
_TRIES = 100


class Places:
    """A block 127.x.y.0/24 that nobody listens in. `counts` says how many pods a workload has, `s3` where S3 is."""

    def __init__(self, counts: Mapping[str, int], s3: str) -> None:
        self._counts, self._s3 = counts, s3
        self._block = _free_block()

    def ip(self, workload: str, index: int) -> str:
        """Address of one pod."""
        return f"{self._block}.{_FIRST[workload] + index}"

    def link(self, pod: int, index: int) -> str:
        """Address at which a linked pod finds server `index`."""
        return f"{self._block}.{_LINKS + 10 * pod + index}"

    def uids(self, index: int) -> int:
        """First user id of the candidates of sandbox `index`: used by no other sandbox of this machine."""
        _, x, y = self._block.split(".")
        return _UIDS + (256 * int(x) + int(y)) * _BLOCK_UIDS + index * _POD_UIDS

    def translated(self, environment: Mapping[str, str], workload: str, index: int) -> dict[str, str]:
        """The settings of one pod with addresses of this machine.

        A name of many pods becomes the list of them: as our router reads it for inference, as gRPC does for others. A
        workload without pods is where nobody answers.
        """
        found = {}
        for name, value in environment.items():
            prefix = "" if name.endswith("_INFERENCE_ADDRESS") else "ipv4:"
            value = _NAME.sub(lambda match, prefix=prefix: self._address(match, prefix), value)  # type: ignore[misc]
            found[name] = value.replace("0.0.0.0:", f"{self.ip(workload, index)}:")
        return found

    def _address(self, match: re.Match[str], prefix: str) -> str:
        owner, number, name, port = match.groups()
        if name == "s3":
            return self._s3
        if owner:
            return f"{self.ip(owner, int(number))}:{port}"
        pods = max(self._counts.get(name, 0), 1)
        return prefix + ",".join(f"{self.ip(name, index)}:{port}" for index in range(pods))


def _free_block() -> str:
    """The beginning of addresses of which the first that a pod would take is free."""
    chance = random.SystemRandom()
    for _ in range(_TRIES):
        block = f"127.{chance.randrange(1, 255)}.{chance.randrange(256)}"
        with socket.socket() as probe:
            try:
                probe.bind((f"{block}.{_FIRST['nats']}", 4222))
            except OSError:
                continue
        return block
    raise PortTaken(f"no free block of loopback addresses was found in {_TRIES} tries")
