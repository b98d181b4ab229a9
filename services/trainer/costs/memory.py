"""Bytes that a training needs, by component, from shapes alone."""

from __future__ import annotations

from typing import Final

from services.trainer.adapters.targets import linear_tensors, scales_inputs, target_shapes
from services.trainer.parallel.splits import own_part
from services.trainer.settings.ia3 import Ia3Settings
from services.trainer.settings.training import TrainSettings
from smeltkit import limits
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.nf4_layout import stored_bytes

LOGITS_BYTES = 320_000_000
"""Most that the fused loss holds of the logits."""

CONTEXT_BYTES: Final = 700 * limits.MIB
"""What the driver takes of a GPU for a process, beside the tensors, with some room."""

_STATE_BYTES: Final = {"float32": 8.0, "bfloat16": 4.0, "int8": 2 * (1 + 4 / 256)}
"""Bytes of both moments of a value."""
_IMPORTANCE_BYTES: Final = 8.0
"""Bytes of what ranks are shared out by, of a value."""


def trainable_parameters(config: ModelConfig, settings: TrainSettings) -> int:
    """Values that the optimizer moves."""
    if not settings.is_adapted:
        return config.parameters
    adapter, shapes = settings.adapter, target_shapes(config, settings.adapter)
    if isinstance(adapter, Ia3Settings):
        return config.layers * sum(shape[scales_inputs(name)] for name, shape in shapes.items())
    magnitudes = sum(outputs for outputs, _ in shapes.values()) if adapter.dora else 0
    diagonals = adapter.trained_rank * len(shapes) if adapter.adalora else 0
    return config.layers * (adapter.trained_rank * sum(map(sum, shapes.values())) + magnitudes + diagonals)


def _weights_bytes(config: ModelConfig, settings: TrainSettings, value_bytes: int) -> int:
    """Bytes of the base while training."""
    if settings.method != "qlora":
        return config.parameters * value_bytes
    linear = [spec.elements for spec in linear_tensors(config)]
    kept = config.parameters - config.layers * sum(linear)
    # One weight is dequantized at a time.
    return kept * value_bytes + config.layers * sum(map(stored_bytes, linear)) + max(linear) * value_bytes


def components(config: ModelConfig, settings: TrainSettings) -> dict[str, int]:
    """Component to bytes at the peak of a step: exact for what is stored, an estimate for activations.

    Activations are highest when the backward pass begins. Of the gradients of a step's first pack only the head's
    exist then; those of earlier packs all do. Where float32 gradients of all weights take more than that, in the
    update, the difference is told as `updating`. A layer keeps the inputs and outputs of its norms, queries, keys,
    values and of the MLP gate and up, with adapters their product too; with recomputation only its input. Adapters are
    float32 whatever the base is.
    A base that is quantized is loaded as it is stored first. Of several processes it is the memory of each: what is
    stored is spread over them; two layers at a time are whole, or all, embedding and head always. It is loaded whole.
    Where they compute layers together, all of that is of one's own part of the model; where they share packs, one's
    tokens are its part of a pack, but for keys and values, which are gathered.
    """
    value_bytes, shards = 4 if settings.dtype == "float32" else 2, settings.shards
    whole_bytes, config = config.parameters * value_bytes, own_part(config, settings)
    tokens = -(-settings.pack_size_tokens // settings.parallel.context)
    trained = trainable_parameters(config, settings)
    trained_bytes = 4 if settings.is_adapted else value_bytes
    gradients = trained * trained_bytes
    head = 0 if settings.is_adapted else config.vocab_size * config.hidden_size * trained_bytes
    size = config.dimensions()
    inner = (3 if settings.is_adapted else 2) * size["intermediate"]
    kept = 4 * size["hidden"] + 2 * size["q"] + 2 * size["kv"] + inner
    per_token = size["hidden"] if settings.recompute else kept
    live = per_token * config.layers + (kept if settings.recompute else 0)
    base, adapters = _weights_bytes(config, settings, value_bytes), trained * 4 if settings.is_adapted else 0
    is_whole = settings.is_adapted and (settings.method == "qlora" or not settings.regather)
    has_rounds = settings.packs_per_step > settings.replicas
    spread = {
        "weights": adapters + (0 if is_whole else base),
        "gradients": gradients if has_rounds else min(head, gradients),
        **({"masters": 0, "optimizer": 0} if settings.optimizer.offload else state_bytes(config, settings)),
    }
    needs = {name: -(-size_bytes // shards) for name, size_bytes in spread.items()}
    needs["weights"] += base if is_whole else 0
    if shards > 1:
        outside = value_bytes * sum(s.elements for s in config.tensors() if not s.name.startswith("layers."))
        outside = 0 if is_whole else outside
        layers = 2 if settings.regather else config.layers
        needs["gathered"] = outside + (layers * (spread["weights"] - outside) + gradients) // config.layers
    gathered = 0 if settings.parallel.context == 1 else 2 * size["kv"] * (1 if settings.recompute else config.layers)
    needs |= {
        "activations": (live * tokens + gathered * settings.pack_size_tokens) * value_bytes,
        "logits": min(LOGITS_BYTES, tokens * config.vocab_size * value_bytes),
    }
    stored = needs["weights"] + needs["masters"] + needs["optimizer"]
    updating = stored + (4 * trained if needs["masters"] else gradients) // shards
    needs["updating"] = max(updating - sum(needs.values()), 0)
    return {**needs, "loading": max(whole_bytes - sum(needs.values()), 0)}


def state_bytes(config: ModelConfig, settings: TrainSettings) -> dict[str, int]:
    """Bytes of float32 copies and of moments, wherever they lie; in 8 bits as if all were quantized."""
    trained, how = trainable_parameters(config, settings), settings.optimizer
    is_exact = settings.is_adapted or settings.dtype == "float32"
    has_copies = how.offload or not (is_exact or how.state == "bfloat16")
    importance = _IMPORTANCE_BYTES if settings.lora.adalora else 0.0
    state = round((_STATE_BYTES[how.state] + importance) * trained)
    return {"masters": 4 * trained if has_copies else 0, "optimizer": state}


def host_components(config: ModelConfig, settings: TrainSettings) -> dict[str, int]:
    """Component to bytes in the memory of the host, of each process, beside what a training without a GPU computes in.

    A checkpoint is written from a copy, which stays for the next one.
    """
    return {
        "optimizer": sum(state_bytes(config, settings).values()) if settings.optimizer.offload else 0,
        "copy of a checkpoint": -(-checkpoint_bytes(config, settings) // settings.shards),
    }


def checkpoint_bytes(config: ModelConfig, settings: TrainSettings) -> int:
    """Bytes of a checkpoint: the trained values, their float32 copies and the optimizer's state."""
    value_bytes = 4 if settings.is_adapted or settings.dtype == "float32" else 2
    return trainable_parameters(config, settings) * value_bytes + sum(state_bytes(config, settings).values())
