"""Quantization schemes: which storage type llama.cpp will give every tensor, and how many bytes that makes.

The forecast restates the mixing rules of `src/llama-quant.cpp` of the pinned llama.cpp for the architectures here, so
that a plan can be shown before work begins and the result can be held against it, tensor by tensor. What llama.cpp does
in silence is said aloud: where a row does not divide into blocks it swaps in another type, which here is either one of
the scheme's declared fallbacks or a refusal that names the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from smeltkit.errors import UnsupportedQuantization
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig, TensorSpec
from smeltkit.ml.gguf_io import GGML_TYPES, type_size

__all__ = [
    "SCHEMES",
    "Scheme",
    "check_source",
    "coverage",
    "planned_size_bytes",
    "planned_types",
    "scheme_of",
    "type_size",
]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store a model's matrices; vectors are always float32."""

    base: str
    """Type of a matrix that no rule below raises."""
    file_type: int
    """llama.cpp's number for a file of this scheme (`llama_ftype`)."""
    head: str = ""
    """Type of the output head, or of the embedding where both are one; empty: `base`."""
    sensitive: str = ""
    """Type of value (or fused qkv) and down projections in the layers that get more bits; empty: `base`."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Type that replaces another one where a row is no whole number of its blocks."""

    @property
    def is_float(self) -> bool:
        """Whether the scheme only changes the float type."""
        return GGML_TYPES[self.base].block == 1


_K_FALLBACKS = MappingProxyType({"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"})

SCHEMES: Mapping[str, Scheme] = MappingProxyType({
    "F32": Scheme(base="F32", file_type=0),
    "BF16": Scheme(base="BF16", file_type=32),
    "F16": Scheme(base="F16", file_type=1),
    "Q8_0": Scheme(base="Q8_0", file_type=7),
    "Q6_K": Scheme(base="Q6_K", file_type=18, fallbacks=_K_FALLBACKS),
    "Q5_K_M": Scheme(base="Q5_K", file_type=17, head="Q6_K", sensitive="Q6_K", fallbacks=_K_FALLBACKS),
    "Q4_K_M": Scheme(base="Q4_K", file_type=15, head="Q6_K", sensitive="Q6_K", fallbacks=_K_FALLBACKS),
    "Q4_0": Scheme(base="Q4_0", file_type=2, head="Q6_K", fallbacks=_K_FALLBACKS),
})  # fmt: skip
"""Scheme name to its rules, from most to fewest bits."""


def scheme_of(name: str) -> Scheme:
    """The scheme of this name; UnsupportedQuantization lists the known ones."""
    if name not in SCHEMES:
        raise UnsupportedQuantization(f"scheme {name!r} is not known; known are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def planned_types(config: ModelConfig, scheme: str) -> dict[str, str]:
    """GGUF tensor name to storage type, as llama.cpp will choose it.

    UnsupportedQuantization names the first tensor whose rows divide into blocks of neither the type nor its fallback.
    """
    rules = scheme_of(scheme)
    types: dict[str, str] = {}
    for spec in config.tensors():
        types[names.canonical_to_gguf(config.architecture, spec.name)] = _type_of(config, rules, scheme, spec)
    return types | _rope_types(config)


def planned_size_bytes(config: ModelConfig, scheme: str) -> int:
    """Bytes of all tensors under a scheme, without the metadata (some hundred kilobytes of vocabulary)."""
    types = planned_types(config, scheme)
    return sum(
        type_size(types[names.canonical_to_gguf(config.architecture, spec.name)], spec.shape)
        for spec in config.tensors()
    )


def coverage(config: ModelConfig, scheme: str) -> float:
    """Share of all parameters that the scheme stores in fewer bits than 16, from 0 to 1."""
    types = planned_types(config, scheme)
    low = sum(
        spec.elements
        for spec in config.tensors()
        if GGML_TYPES[types[names.canonical_to_gguf(config.architecture, spec.name)]].block > 1
    )
    return low / config.parameters


def check_source(source_scheme: str, target_scheme: str) -> None:
    """Raises UnsupportedQuantization where the source has lost bits already: errors would add up unseen."""
    scheme_of(target_scheme)
    if source_scheme == target_scheme:
        raise UnsupportedQuantization(f"the bundle is stored as {target_scheme} already")
    if source_scheme not in SCHEMES or not SCHEMES[source_scheme].is_float:
        raise UnsupportedQuantization(
            f"the bundle is stored as {source_scheme}; only F32, F16 and BF16 bundles can be quantized, so start from"
            " the one it was made from (its lineage names it)"
        )


def _type_of(config: ModelConfig, rules: Scheme, scheme: str, spec: TensorSpec) -> str:
    if len(spec.shape) < 2:
        return "F32"
    chosen = rules.base if rules.is_float else _mixed(config, rules, spec)
    row = spec.shape[-1]
    if row % GGML_TYPES[chosen].block == 0:
        return chosen
    fallback = rules.fallbacks.get(chosen)
    if fallback and row % GGML_TYPES[fallback].block == 0:
        return fallback
    raise UnsupportedQuantization(
        f"{scheme} needs rows divisible by {GGML_TYPES[fallback or chosen].block}; tensor {spec.name} has {row};"
        " choose F16 or BF16"
    )


def _mixed(config: ModelConfig, rules: Scheme, spec: TensorSpec) -> str:
    part = spec.name.rsplit(".", 2)[-2]
    if part == "lm_head" or (part == "embed" and config.tie_embeddings):
        is_divisible = spec.shape[-1] % GGML_TYPES[rules.base].block == 0
        return (rules.head or rules.base) if is_divisible else "Q8_0"
    if part not in ("v", "qkv", "down") or not rules.sensitive:
        return rules.base
    is_raised = _has_more_bits(int(spec.name.split(".")[1]), config.layers)
    if part == "v" and rules.base == "Q4_K" and _is_70b(config) and not is_raised:
        return "Q5_K"
    return rules.sensitive if is_raised else rules.base


def _has_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(config: ModelConfig) -> bool:
    if config.layers != 80:
        return False
    return config.architecture == "qwen2" or (config.architecture == "llama" and config.heads != config.kv_heads)


def _rope_types(config: ModelConfig) -> dict[str, str]:
    kind = (config.rope_scaling or {}).get("rope_type")
    if kind == "llama3":
        return {"rope_freqs.weight": "F32"}
    return {"rope_factors_long.weight": "F32", "rope_factors_short.weight": "F32"} if kind == "longrope" else {}
