"""GGUF metadata of a model's dimensions, in both directions: ModelConfig to keys, keys to a Hugging Face config.json.

Key names and meanings follow llama.cpp's `llama-arch.cpp` and `llama-model.cpp` of the pinned revision, including what
it does *not* read: of YaRN's parameters only factor, original context and (as `attn_factor`, relative to the default)
the attention factor have an effect there, so other values are refused instead of being written in vain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from smeltkit.errors import BadGguf, UnsupportedArchitecture
from smeltkit.ml import rope
from smeltkit.ml.gguf_io import shortest

if TYPE_CHECKING:
    from smeltkit.ml.arch import ModelConfig

_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_REQUIRED = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def metadata_of(config: ModelConfig) -> dict[str, Any]:
    """The GGUF keys of the dimensions; UnsupportedArchitecture if llama.cpp cannot run the model."""
    check_convertible(config)
    values: dict[str, Any] = {
        "context_length": config.context_tokens,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rotary_dim,
        "vocab_size": config.vocab_size,
        **_scaling_metadata(config.rope_scaling or {}),
    }
    if config.architecture == "phi3":
        values["attention.sliding_window"] = 0
    prefixed = {f"{config.architecture}.{key}": value for key, value in values.items()}
    return {"general.architecture": config.architecture, **prefixed}


def check_convertible(config: ModelConfig) -> None:
    """Raises UnsupportedArchitecture, with the reason, for a model that llama.cpp cannot run as it is."""
    traits, kind = config.traits, (config.rope_scaling or {}).get("rope_type", "")
    if traits.is_gguf_attention_square and config.heads * config.head_dim != config.hidden_size:
        raise UnsupportedArchitecture(
            f"llama.cpp runs {config.architecture} only where heads * head_dim equals hidden_size; here it is"
            f" {config.heads} * {config.head_dim} and {config.hidden_size}"
        )
    if kind and kind not in traits.gguf_rope_scaling:
        raise UnsupportedArchitecture(
            f"llama.cpp ignores rope scaling {kind!r} for {config.architecture}; it knows"
            f" {', '.join(sorted(traits.gguf_rope_scaling))}"
        )
    for flag in ("attention_bias", "output_bias", "mlp_bias"):
        if getattr(config, flag) and flag not in traits.gguf_biases:
            raise UnsupportedArchitecture(f"llama.cpp reads no {flag} tensors for {config.architecture}")
    if config.rotary_dim != config.head_dim and config.architecture != "phi3":
        raise UnsupportedArchitecture(
            f"llama.cpp rotates whole heads for {config.architecture}; here {config.rotary_dim} of {config.head_dim}"
        )
    if kind == "yarn" and any((config.rope_scaling or {})[key] != value for key, value in _BETAS.items()):
        raise UnsupportedArchitecture(f"llama.cpp reads no YaRN betas for {config.architecture}; they must be {_BETAS}")


def hf_config_of(metadata: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The Hugging Face config.json that GGUF metadata and tensor names describe; BadGguf names a missing key."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise BadGguf("GGUF metadata lacks general.architecture")
    values = _Values(metadata, f"{architecture}.")
    for key in ("expert_count", "rope.scale_linear", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier"):
        if values.number(key, 0):
            raise UnsupportedArchitecture(f"GGUF key {architecture}.{key} is set; such models are not supported")
    config: dict[str, Any] = {key: values.number(name) for key, name in _REQUIRED.items()}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = values.number("attention.key_length", hidden // heads)
    if values.number("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitecture(
            f"GGUF declares keys of width {head_dim} and values of another; both must be equal"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    config |= {
        "model_type": architecture,
        "num_key_value_heads": values.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": values.number("vocab_size", len(tokens) if isinstance(tokens, list) else 0),
        "hidden_act": "silu",
        "rope_theta": float(values.number("rope.freq_base", 10000.0)),
        "partial_rotary_factor": values.number("rope.dimension_count", head_dim) / head_dim,
        "sliding_window": values.number("attention.sliding_window", 0) or None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    scaling = _hf_scaling(values)
    return config | ({"rope_scaling": scaling} if scaling else {})


class _Values:
    """The metadata of one architecture, read with checks: foreign files hold texts where numbers belong."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number, not negative; BadGguf if it is none, or if there is neither a value nor a default."""
        value = self._metadata.get(self._prefix + key, default)
        if value is None:
            raise BadGguf(f"GGUF metadata lacks {self._prefix}{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise BadGguf(f"GGUF key {self._prefix}{key} is {str(value)[:80]!r}; it must be one number, 0 or above")
        if default is None and value == 0:
            raise BadGguf(f"GGUF key {self._prefix}{key} is 0; it must be above 0")
        return shortest(value) if isinstance(value, float) else value

    def text(self, key: str, default: str) -> str:
        """A text; BadGguf if it is something else."""
        value = self._metadata.get(self._prefix + key, default)
        if not isinstance(value, str):
            raise BadGguf(f"GGUF key {self._prefix}{key} must be a text")
        return value


def _scaling_metadata(scaling: Mapping[str, Any]) -> dict[str, Any]:
    kind = scaling.get("rope_type")
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling["factor"],
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": scaling["attention_factor"] / rope.yarn_attention_factor(scaling["factor"]),
        }
    if kind == "longrope":
        return {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": scaling["attention_factor"],
        }
    return {}


def _hf_scaling(values: _Values) -> dict[str, Any] | None:
    kind, factor = values.text("rope.scaling.type", "none"), values.number("rope.scaling.factor", 0.0)
    original = values.number("rope.scaling.original_context_length", values.number("context_length"))
    attention = values.number("rope.scaling.attn_factor", 1.0)
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaled = attention * rope.yarn_attention_factor(factor)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": scaled,
        }
    if kind == "longrope":
        return {"rope_type": "longrope", "original_max_position_embeddings": original, "attention_factor": attention}
    if kind not in ("none", "linear"):
        raise UnsupportedArchitecture(f"GGUF declares rope scaling {kind!r}; known are linear, yarn and longrope")
    return None
