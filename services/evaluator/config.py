"""Settings of the evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """Prefix `SMELT_EVALUATOR_`."""

    inference_address: str
    """Inference that generates: host:port, several separated by commas; names are looked up again and again."""
    sandbox_address: str
    """Sandbox that judges: host:port."""
    data_dir: Path | None = None
    """Folder where data of suites is looked for when it is not stored yet; none unless set."""
    download: bool = True
    """Whether data that is neither stored nor in a folder is fetched from its published address."""
    concurrency: int = 8
    """Completions in flight at once of one evaluation whose request names no number, 1 to 256."""
    slots: int = 1
    """Jobs at once, 1 to 64."""

    def __post_init__(self) -> None:
        for name in ("inference_address", "sandbox_address"):
            if ":" not in getattr(self, name):
                raise BadConfig(f"{name}={getattr(self, name)!r} must be host:port")
        if not 1 <= self.concurrency <= limits.EVALUATION_CONCURRENCY_MAX:
            raise BadConfig(f"concurrency={self.concurrency} must be 1 to {limits.EVALUATION_CONCURRENCY_MAX}")
        if not 1 <= self.slots <= limits.EVALUATION_SLOTS_MAX:
            raise BadConfig(f"slots={self.slots} must be 1 to {limits.EVALUATION_SLOTS_MAX}")
