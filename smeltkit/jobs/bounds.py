"""The times and counts that jobs live by, in one value so that a test can shorten them."""

from __future__ import annotations

from dataclasses import dataclass

from smeltkit import limits
from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class JobBounds:
    """Bounds of jobs; the defaults are those of `limits`."""

    lease_ttl_s: float = limits.JOB_LEASE_TTL_S
    """Life of a lease that is not renewed; must equal that of the leases bucket."""
    heartbeat_s: float = limits.JOB_HEARTBEAT_S
    """Time between two renewals; at most a third of `lease_ttl_s`."""
    sweep_period_s: float = limits.JOB_SWEEP_PERIOD_S
    """Time between two sweeps."""
    attempts_max: int = limits.JOB_ATTEMPTS_MAX
    """Attempts before a job fails for good."""
    backoff_s: tuple[float, ...] = limits.JOB_BACKOFF_S
    """Wait before the second, third ... attempt after a retryable error; the last one repeats."""
    no_worker_s: float = limits.JOB_QUEUE_NO_WORKER_S
    """Time without any live worker of a service after which its queued jobs fail."""
    cancel_grace_s: float = limits.JOB_CANCEL_GRACE_S
    """Time that a cancelled handler has for cleaning up."""
    progress_period_s: float = limits.JOB_PROGRESS_PERIOD_S
    """Least time between two stored reports of progress."""
    watch_heartbeat_s: float = limits.JOB_WATCH_HEARTBEAT_S
    """Longest silence of a watch."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 3 <= self.lease_ttl_s:
            raise BadConfig(f"heartbeat_s={self.heartbeat_s} must lie in (0, {self.lease_ttl_s / 3:g}]")
        if self.attempts_max < 1 or not self.backoff_s:
            raise BadConfig(f"attempts_max={self.attempts_max} and backoff_s={self.backoff_s} need at least one entry")

    def backoff_after(self, attempt: int) -> float:
        """Seconds to wait after the failure of attempt number `attempt` (from 1)."""
        return self.backoff_s[min(attempt, len(self.backoff_s)) - 1]
