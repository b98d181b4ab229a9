"""Settings of the importer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class ImporterConfig:
    """Prefix `SMELT_IMPORTER_`. The model hub is set by the hub library's own HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE."""

    inference_address: str
    """Inference that probes what is stored: host:port, several separated by commas."""
    cache_dir: Path = Path(".smelt/cache/importer")
    """Folder of fetched bundles and of work under way."""
    cache_bytes: int = 20 * limits.GIB
    """Bytes that fetched bundles may take, except for what is in use."""
    slots: int = 1
    """Jobs at once, 1 to 64."""
    threads: int = 0
    """Threads of a quantization; 0 for as many as there are cores."""

    def __post_init__(self) -> None:
        if ":" not in self.inference_address:
            raise BadConfig(f"inference_address={self.inference_address!r} must be host:port")
        if not 1 <= self.slots <= 64 or not 0 <= self.threads <= 1024:
            raise BadConfig(f"slots={self.slots} must be 1 to 64 and threads={self.threads} 0 to 1024")
        if self.cache_bytes < limits.MIB:
            raise BadConfig(f"cache_bytes={self.cache_bytes} must be at least {limits.MIB}")
