"""Settings of the sandbox service: prefix `SMELT_SANDBOX_`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from services.sandbox.policy import Level
from smeltkit.errors import BadConfig

_SLOTS_MAX: Final = 256
_UID_MAX: Final = 0xFFFF0000
UIDS_PER_SLOT: Final = 6


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """How many candidates run at once, and how isolated they must be."""

    level: str = "rootless"
    """Least isolation accepted: confined, rootless, jail or guest-kernel. Below it the service refuses to start."""
    ceiling: str = "guest-kernel"
    """Best isolation used, for hosts that could do more; what it leaves out is on every verdict."""
    slots: int = 0
    """Candidates at once; 0 for one per core."""
    uid_base: int = 0x70000000
    """First host uid for candidates when the service is root; 6 a slot, used by nobody else."""
    science_packages: str = ""
    """Folder of packages (a site-packages of this interpreter) for the profile science; empty for no such profile."""
    science_preload: str = "numpy"
    """Modules, separated by commas, that the profile science imports once and not in every run."""
    queue_per_slot: int = 4
    """Single requests that may wait, per slot; more are refused with a time to retry. Batches wait in their stream."""
    runs_per_slot: int = 10_000
    """Runs after which a slot is built anew."""
    probe_period_s: float = 600.0
    """Seconds between probes of the isolation layers; a lost layer makes the service not ready."""

    def __post_init__(self) -> None:
        Level.named(self.level)
        Level.named(self.ceiling)
        if not 0 <= self.slots <= _SLOTS_MAX:
            raise BadConfig(f"slots={self.slots} is out of range; allowed are 0 (one per core) to {_SLOTS_MAX}")
        if not 65536 <= self.uid_base <= _UID_MAX:
            raise BadConfig(f"uid_base={self.uid_base} is out of range; allowed are 65536 to {_UID_MAX}")
        for name in ("queue_per_slot", "runs_per_slot", "probe_period_s"):
            if getattr(self, name) <= 0:
                raise BadConfig(f"{name}={getattr(self, name)} must be positive")

    @property
    def slot_count(self) -> int:
        """Slots to build on this machine."""
        return self.slots or len(os.sched_getaffinity(0))
