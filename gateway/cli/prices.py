"""Prices for `smelt jobs cost`."""

from __future__ import annotations

from dataclasses import dataclass

from smeltkit.errors import BadConfig


@dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """Prefix `SMELT_PRICE_`: what `smelt jobs cost` takes things to cost, all in one currency."""

    currency: str = ""
    """What the prices are in, e.g. EUR; only shown."""
    machine_hour: float = 0.0
    """An hour of a job, without its GPUs."""
    gpu_hour: float = 0.0
    """An hour of one GPU."""
    million_tokens: float = 0.0
    """A million tokens, trained on or generated."""
    gib: float = 0.0
    """A GiB of stored results."""

    def __post_init__(self) -> None:
        for name in ("machine_hour", "gpu_hour", "million_tokens", "gib"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadConfig(f"{name}={getattr(self, name):g} must be 0 or more")

    @property
    def is_set(self) -> bool:
        """Whether anything has a price."""
        return any((self.machine_hour, self.gpu_hour, self.million_tokens, self.gib))
