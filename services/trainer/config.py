"""Settings of the trainer: none of its own yet, so an unknown SMELT_TRAINER_ variable is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Prefix `SMELT_TRAINER_`."""
