"""Architectures as data: what a model's config declares, and which tensors of which shape follow from it.

`ModelConfig` is the only place that knows a model's dimensions. `head_dim`, key-value heads and the intermediate size
come from the config file and are never computed anywhere else: many models have head_dim != hidden_size / heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from smeltkit import limits
from smeltkit.errors import BadModelConfig, UnsupportedArchitecture
from smeltkit.ml import names, rope
from smeltkit.ml.gguf_config import hf_config_of


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What holds for every model of one architecture."""

    hf_class: str
    """Name in `architectures` of config.json."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMS norm per head before rope."""
    fused_projections: bool = False
    """Whether q, k, v and gate, up are stored as one tensor each."""
    attention_bias: bool | None = None
    """Whether q, k and v have biases; None: the config's `attention_bias` says so, and then the output has one too."""
    head_dim: int | None = None
    """Width of a head when config.json does not say; None: hidden_size / heads."""
    is_rope_interleaved_in_gguf: bool = False
    """Whether llama.cpp rotates neighbouring pairs, so that q and k rows are stored permuted in GGUF."""
    is_gguf_attention_square: bool = False
    """Whether llama.cpp requires heads * head_dim == hidden_size."""
    gguf_rope_scaling: frozenset[str] = frozenset({"linear", "yarn"})
    """Rope scalings that llama.cpp honours for this architecture."""
    gguf_biases: frozenset[str] = frozenset({"attention_bias"})
    """Bias flags of ModelConfig whose tensors llama.cpp reads for this architecture."""


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(
            hf_class="LlamaForCausalLM",
            is_rope_interleaved_in_gguf=True,
            gguf_rope_scaling=frozenset({"linear", "yarn", "llama3"}),
            gguf_biases=frozenset({"attention_bias", "output_bias", "mlp_bias"}),
        ),
        "qwen2": Architecture(hf_class="Qwen2ForCausalLM", attention_bias=True, is_gguf_attention_square=True),
        "qwen3": Architecture(hf_class="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
        "phi3": Architecture(
            hf_class="Phi3ForCausalLM",
            fused_projections=True,
            attention_bias=False,
            is_gguf_attention_square=True,
            gguf_rope_scaling=frozenset({"longrope"}),
            gguf_biases=frozenset(),
        ),
    }
)
"""`model_type` of config.json to what holds for it."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor a model must have: canonical name and shape, outermost dimension first."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's dimensions and switches, checked. Sizes count elements; `context_tokens` is what is exact."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    rope_scaling: Mapping[str, Any] | None
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fused_projections: bool

    def __post_init__(self) -> None:
        names.table_of(self.architecture)
        bounds = {"vocab_size": limits.VOCAB_MAX, "layers": limits.LAYERS_MAX}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            high = bounds.get(field.name, limits.DIMENSION_MAX)
            if field.type == "int" and not _is_count(value, high):
                raise BadModelConfig(f"config.json: {field.name} is {value!r}; must be a whole number from 1 to {high}")
            if field.type == "bool" and not isinstance(value, bool):
                raise BadModelConfig(f"config.json: {field.name} is {value!r}; it must be true or false")
        if self.heads % self.kv_heads:
            raise BadModelConfig(f"config.json: {self.heads} heads cannot share {self.kv_heads} key-value heads evenly")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise BadModelConfig(
                f"config.json: {self.rotary_dim} of {self.head_dim} dimensions of a head are rotated;"
                " the number must be even and at most head_dim"
            )

    @property
    def traits(self) -> Architecture:
        """What holds for every model of this architecture."""
        return ARCHITECTURES[self.architecture]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The dimensions in a Hugging Face config.json.

        Raises UnsupportedArchitecture for what the decoder does not do (it is never ignored), BadModelConfig for a
        missing or absurd value. An active sliding window caps `context_tokens`: up to it, full attention is exact.
        """
        architecture = _architecture_of(config)
        traits = ARCHITECTURES[architecture]
        heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
        head_dim = config.get("head_dim") or traits.head_dim or hidden // heads
        rotated = rope.number(rope.rope_parameters(config)["partial_rotary_factor"], "partial_rotary_factor")
        rotary_dim = int(head_dim * rotated) if isinstance(head_dim, int) else 0
        context = _count(config, "max_position_embeddings")
        has_bias = traits.attention_bias is None and _flag(config, "attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden,
            layers=_count(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads"),
            head_dim=head_dim,
            intermediate_size=_count(config, "intermediate_size"),
            context_tokens=min(context, _sliding_window(config, architecture) or context),
            rms_norm_eps=rope.number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=rope.number(rope.rope_parameters(config)["rope_theta"], "rope_theta"),
            rotary_dim=rotary_dim,
            rope_scaling=rope.normalize_scaling(config, context_tokens=context, half_rotary=rotary_dim // 2),
            tie_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=has_bias if traits.attention_bias is None else traits.attention_bias,
            output_bias=has_bias,
            mlp_bias=architecture == "llama" and _flag(config, "mlp_bias"),
            qk_norm=traits.qk_norm,
            fused_projections=traits.fused_projections,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensors: Collection[str]) -> ModelConfig:
        """The dimensions in a GGUF file's metadata and tensor names; errors as in `from_hf`.

        llama3 rope scaling leaves no key in GGUF, only factors in a tensor; `gguf_convert` recovers it.
        """
        return cls.from_hf(hf_config_of(metadata, tensors))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest."""
        value = dataclasses.asdict(self)
        value["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelConfig:
        """The config of `to_dict`; BadModelConfig names missing and unknown keys."""
        known = {field.name for field in dataclasses.fields(cls)}
        if set(value) != known:
            raise BadModelConfig(f"model config has unknown or missing keys: {', '.join(sorted(set(value) ^ known))}")
        return cls(**value)

    def dimensions(self) -> dict[str, int]:
        """The symbols that `names.TensorRow.dims` uses, resolved."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
            "head": self.head_dim,
            "q": q,
            "kv": kv,
            "qkv": q + 2 * kv,
            "gate_up": 2 * self.intermediate_size,
        }

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor that the weights must hold, no more and no less, in forward order."""
        symbols = self.dimensions()
        layered: list[tuple[str, tuple[int, ...]]] = []
        found: list[tuple[str, tuple[int, ...]]] = []
        for row in names.table_of(self.architecture):
            if not row.needs or (not self.tie_embeddings if row.needs == "untied" else getattr(self, row.needs)):
                (layered if row.is_layered else found).append((row.canonical, tuple(symbols[dim] for dim in row.dims)))
        body = [(name.format(layer), shape) for layer in range(self.layers) for name, shape in layered]
        return tuple(TensorSpec(name=name, shape=shape) for name, shape in [*found[:1], *body, *found[1:]])

    @property
    def parameters(self) -> int:
        """Number of values in all tensors; tied embeddings count once."""
        return sum(spec.elements for spec in self.tensors())

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes that one token occupies in the key-value cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes


def _architecture_of(config: Mapping[str, Any]) -> str:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"config.json: model_type {name!r} is not supported; supported are"
            f" {', '.join(ARCHITECTURES)} (remote code is never run)"
        )
    classes = config.get("architectures") or [ARCHITECTURES[name].hf_class]
    if classes != [ARCHITECTURES[name].hf_class]:
        raise UnsupportedArchitecture(
            f"config.json: architectures is {classes!r}; of model_type {name} only"
            f" {ARCHITECTURES[name].hf_class} is supported"
        )
    if config.get("quantization_config"):
        raise UnsupportedArchitecture(
            "config.json has a quantization_config: the weights are quantized already;"
            " import the unquantized model, or a GGUF"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedArchitecture(f"config.json: hidden_act {config['hidden_act']!r} is not supported, only silu")
    return name


def _sliding_window(config: Mapping[str, Any], architecture: str) -> int | None:
    is_active = architecture == "phi3" or bool(config.get("use_sliding_window", False))
    if architecture == "llama" or not is_active or config.get("sliding_window") is None:
        return None
    return _count(config, "sliding_window")


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not _is_count(value, limits.DIMENSION_MAX):
        raise BadModelConfig(f"config.json: {key} is {value!r}, not a whole number from 1 to {limits.DIMENSION_MAX}")
    return int(value)  # type: ignore[arg-type]


def _is_count(value: Any, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise BadModelConfig(f"config.json: {key} is {value!r}; it must be true or false")
    return value
