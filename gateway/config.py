"""Settings of the gateway: where the services are, and how the HTTP edge is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Prefix `SMELT_GATEWAY_`. Addresses are host:port, or dns:///name:port to spread calls over replicas."""

    http_listen: str = "127.0.0.1:0"
    """host:port of the HTTP edge; port 0 takes a free one, which the log tells."""
    importer_address: str
    """Where the importer answers."""
    trainer_address: str
    """Where the trainer answers."""
    inference_address: str
    """Where inference answers: host:port, several separated by commas; names are looked up again and again."""
    evaluator_address: str
    """Where the evaluator answers."""
    sandbox_address: str
    """Where the sandbox answers."""

    def __post_init__(self) -> None:
        host, _, port = self.http_listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise BadConfig(f"http_listen={self.http_listen!r} must be host:port with a port of 0 to 65535")

    @property
    def addresses(self) -> Mapping[str, str]:
        """Address of each service by its name."""
        return {
            "importer": self.importer_address,
            "trainer": self.trainer_address,
            "inference": self.inference_address,
            "evaluator": self.evaluator_address,
            "sandbox": self.sandbox_address,
        }
