"""Which layers can carry an adapter: known from the architecture alone, without torch."""

from __future__ import annotations

from services.trainer.settings.training import AdapterSettings
from smeltkit.errors import BadConfig
from smeltkit.ml.arch import ModelConfig, TensorSpec


def linear_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of a block's linear layers, in forward order: `attn.q`, ..., `mlp.down`."""
    return tuple(spec.name.removeprefix("layers.0.").removesuffix(".weight") for spec in linear_tensors(config))


def linear_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The weights of the first block's linear layers; all blocks are alike."""
    block = [spec for spec in config.tensors() if spec.name.startswith("layers.0.") and spec.name.endswith(".weight")]
    return tuple(spec for spec in block if len(spec.shape) == 2)


def target_shapes(config: ModelConfig, adapter: AdapterSettings) -> dict[str, tuple[int, ...]]:
    """Shape [outputs, inputs] of each layer of a block that carries an adapter under these settings."""
    known = dict(zip(linear_names(config), (spec.shape for spec in linear_tensors(config)), strict=True))
    return {name: shape for name, shape in known.items() if not adapter.targets or name in adapter.targets}


def scales_inputs(name: str) -> bool:
    """Whether a vector on this layer scales its inputs; of all others it scales the outputs."""
    return name == "mlp.down"


def unknown_targets(config: ModelConfig, adapter: AdapterSettings) -> list[BadConfig]:
    """Why the model cannot carry such an adapter: the first target that it does not have."""
    known = linear_names(config)
    unknown = [name for name in adapter.targets if name not in known]
    said = f"{adapter.key}.targets: {unknown[0]!r}" if unknown else ""
    return [BadConfig(f"{said} is no linear layer of this model; it has {', '.join(known)}")] if unknown else []
