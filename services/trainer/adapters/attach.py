"""Adapters put on a base, of whatever kind the settings ask for."""

from __future__ import annotations

from services.trainer.adapters.adalora import AdaloraLinear
from services.trainer.adapters.carriers import Carrier, Frozen
from services.trainer.adapters.ia3 import Ia3Linear
from services.trainer.adapters.lora import LoraLinear
from services.trainer.adapters.targets import linear_names, scales_inputs, unknown_targets
from services.trainer.settings.training import AdapterSettings, LoraSettings
from smeltkit.ml.decoder import Decoder


def attach(decoder: Decoder, config: AdapterSettings) -> list[str]:
    """Puts an adapter on every target of every layer and freezes the rest; the names of what carries one.

    BadConfig names a target that the architecture does not have.
    """
    for unknown in unknown_targets(decoder.config, config):
        raise unknown
    decoder.requires_grad_(False)
    names = []
    for index, layer in enumerate(decoder.layers):
        for name in config.targets or linear_names(decoder.config):
            part, _, leaf = name.partition(".")
            parent = layer.get_submodule(part)
            base = parent.get_submodule(leaf)
            assert isinstance(base, Frozen), f"{name} carries an adapter already"
            setattr(parent, leaf, _carrier(base, name, config))
            names.append(f"layers.{index}.{name}")
    return names


def _carrier(base: Frozen, name: str, config: AdapterSettings) -> Carrier:
    if isinstance(config, LoraSettings):
        return AdaloraLinear(base, config) if config.adalora else LoraLinear(base, config)
    return Ia3Linear(base, scales_inputs=scales_inputs(name))
