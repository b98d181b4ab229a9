"""Which layers can carry an adapter: known from the architecture alone, without torch."""

from __future__ import annotations

from smeltkit.ml.arch import ModelConfig, TensorSpec


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of a block's linear layers, in forward order: `attn.q`, ..., `mlp.down`."""
    return tuple(spec.name.removeprefix("layers.0.").removesuffix(".weight") for spec in linear_tensors(config))


def linear_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The weights of the first block's linear layers; all blocks are alike."""
    block = [spec for spec in config.tensors() if spec.name.startswith("layers.0.") and spec.name.endswith(".weight")]
    return tuple(spec for spec in block if len(spec.shape) == 2)
