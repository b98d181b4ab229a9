"""The shape of a model that begins with random weights: the base's config.json with other dimensions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from services.trainer.settings.training import ShapeSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.model_files import read_json

CONFIG_FILE: Final = "config.json"
_KEYS: Final = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Dimension to its key in config.json."""
_PER_LAYER: Final = ("layer_types", "max_window_layers")
"""Keys that speak of single layers; they do not outlive another number of them."""


def shaped(folder: Path, config: ModelConfig, shape: ShapeSettings) -> ModelConfig:
    """The dimensions of the base in `folder` with `shape`; BadModelConfig if they do not fit each other."""
    return config if shape == ShapeSettings() else ModelConfig.from_hf(shaped_config(folder, shape))


def shaped_config(folder: Path, shape: ShapeSettings) -> dict[str, Any]:
    """The config.json of the base in `folder` with `shape`."""
    changed = {_KEYS[name]: value for name, value in asdict(shape).items() if value}
    config = {**read_json(folder / CONFIG_FILE), **changed}
    dropped = _PER_LAYER if shape.layers else ()
    return {key: value for key, value in config.items() if key not in dropped}
