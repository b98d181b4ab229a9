"""Angles of rotary positions for every kind of scaling that `smeltkit.ml.rope` normalizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.rope import llama3_frequency_factors


def cos_sin(config: ModelConfig, positions: Tensor, *, sequence_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, rotary_dim / 2] in float32 at positions [T].

    `sequence_tokens` is the longest sequence that this model will see: LongRoPE has two sets of factors and the choice
    may not hang on what else is in a batch.
    """
    inverse, attention = _frequencies(config, sequence_tokens)
    angles = positions.to(torch.float32)[:, None] * inverse.to(positions.device)[None, :]
    return angles.cos() * attention, angles.sin() * attention


def _frequencies(config: ModelConfig, sequence_tokens: int) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2], and the factor on cosine and sine."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    inverse: Tensor = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    kind = scaling["rope_type"] if scaling else "default"
    if scaling is None or kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "llama3":
        return inverse / torch.tensor(llama3_frequency_factors(scaling, config.rope_theta, config.rotary_dim)), 1.0
    if kind == "longrope":
        is_long = sequence_tokens > scaling["original_max_position_embeddings"]
        factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"])
        return inverse / factors, float(scaling["attention_factor"])
    return _yarn(inverse, config, scaling), float(scaling["attention_factor"])


def _yarn(inverse: Tensor, config: ModelConfig, scaling: Mapping[str, Any]) -> Tensor:
    """YaRN's blend: low frequencies are interpolated, high ones kept, a ramp between (arXiv:2309.00071, 3.2)."""
    original, width = scaling["original_max_position_embeddings"], config.rotary_dim

    def index_of(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(index_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(index_of(scaling["beta_slow"])), width - 1)
    ramp = ((torch.arange(width // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inverse * (ramp / float(scaling["factor"]) + 1 - ramp)
