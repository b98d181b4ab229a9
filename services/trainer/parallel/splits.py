"""What each of the processes that compute a layer together holds of a model: known without torch.

Each has its share of the heads, of the MLP's inner width and of the vocabulary. Norms, and what is added to the
residual stream, are whole in all of them.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Final

from services.trainer.settings.training import TrainSettings
from smeltkit.errors import BadConfig, SmeltError, UnsupportedOption
from smeltkit.ml.arch import ModelConfig

_DIVIDED: Final = ("heads", "kv_heads", "intermediate_size", "vocab_size")
"""What of a model's dimensions is shared out."""


def divided(config: ModelConfig, parts: int) -> ModelConfig:
    """The dimensions that one of `parts` processes computes with."""
    return replace(config, **{name: getattr(config, name) // parts for name in _DIVIDED})


def own_part(config: ModelConfig, settings: TrainSettings) -> ModelConfig:
    """The dimensions of one process under these settings; those of the whole if it cannot be split so."""
    return config if refusals(config, settings) else divided(config, settings.parallel.tensor)


def axes_of(config: ModelConfig, parts: int) -> dict[str, int | None]:
    """Canonical name of a tensor to the dimension along which it is split into `parts`; None if it is whole."""
    pairs = zip(config.tensors(), divided(config, parts).tensors(), strict=True)
    return {
        whole.name: next((axis for axis, size in enumerate(whole.shape) if size != part.shape[axis]), None)
        for whole, part in pairs
    }


def refusals(config: ModelConfig, settings: TrainSettings) -> list[SmeltError]:
    """Why this model cannot be split as the settings say."""
    parts = settings.parallel.tensor
    if parts == 1:
        return []
    if config.fused_projections:
        return [
            UnsupportedOption(
                f"parallel.tensor={parts} cannot split the fused projections of {config.architecture}; set it to 1, and"
                " share the training by parallel.context or by more packs a step"
            )
        ]
    common = gcd(*(getattr(config, name) for name in _DIVIDED))
    allowed = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
    return [
        BadConfig(f"parallel.tensor={parts} does not divide {name}={getattr(config, name)}; it may be {allowed}")
        for name in _DIVIDED
        if getattr(config, name) % parts
    ]
