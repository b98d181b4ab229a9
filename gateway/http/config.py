"""Settings of the HTTP edge."""

from __future__ import annotations

from dataclasses import dataclass

from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Prefix `SMELT_HTTP_`."""

    api_keys_file: str = ""
    """File of the keys that are let in, one `TENANT sha256:HEX ...` a line; empty lets everybody in."""
    metrics_listen: str = ""
    """host:port of a page for Prometheus alone, which needs no key; empty for none beside the edge's own."""
    request_max_bytes: int = limits.HTTP_REQUEST_MAX_BYTES
    """Largest request body in bytes, 1 KiB to 64 MiB."""
    request_timeout_s: float = limits.GENERATE_TIMEOUT_S
    """Longest time of one completion in seconds, 1 to 86400; a client's own limit ends it earlier."""
    keepalive_s: float = limits.HTTP_KEEPALIVE_S
    """Seconds of silence after which a stream gets a comment line, so that no proxy closes it; above 0, up to 300."""

    def __post_init__(self) -> None:
        host, _, port = self.metrics_listen.rpartition(":")
        if self.metrics_listen and not (host and port.isdigit() and int(port) <= 65535):
            raise BadConfig(f"metrics_listen={self.metrics_listen!r} must be host:port with a port of 0 to 65535")
        _check("request_max_bytes", self.request_max_bytes, limits.KIB, 64 * limits.MIB)
        _check("request_timeout_s", self.request_timeout_s, 1, limits.CALL_TIMEOUT_MAX_S)
        _check("keepalive_s", self.keepalive_s, 0.01, 300)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadConfig(f"{name}={value:g} is out of range; allowed: {low:g} to {high:g}")
