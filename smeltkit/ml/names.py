"""Tensor names as data: one table an architecture, canonical <-> Hugging Face <-> GGUF, with symbolic shapes.

A canonical name reads `layers.3.attn.q.weight`. Every table is a bijection in all directions: two names never meet, and
a name that the table does not hold is no name of that architecture (property tests hold this). Dimensions are symbols
that `smeltkit.ml.arch.ModelConfig` resolves; `needs` names the ModelConfig flag that brings the tensor into being.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from smeltkit.errors import TensorMismatch, UnsupportedArchitecture

_LAYER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of an architecture: its three names ('{}' stands for the layer), symbolic shape and condition."""

    canonical: str
    hf: str
    gguf: str
    dims: tuple[str, ...]
    needs: str = ""

    @property
    def is_layered(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{}" in self.canonical


def _row(canonical: str, hf: str, gguf: str, *dims: str, needs: str = "") -> TensorRow:
    if canonical.startswith("*"):
        canonical, hf, gguf = "layers.{}" + canonical[1:], "model.layers.{}." + hf, "blk.{}." + gguf
    return TensorRow(canonical=canonical, hf=hf, gguf=gguf, dims=dims, needs=needs)


_HEAD = (_row("embed.weight", "model.embed_tokens.weight", "token_embd.weight", "vocab", "hidden"),)
_TAIL = (
    _row("norm.weight", "model.norm.weight", "output_norm.weight", "hidden"),
    _row("lm_head.weight", "lm_head.weight", "output.weight", "vocab", "hidden", needs="untied"),
)
_NORMS = (
    _row("*.attn_norm.weight", "input_layernorm.weight", "attn_norm.weight", "hidden"),
    _row("*.mlp_norm.weight", "post_attention_layernorm.weight", "ffn_norm.weight", "hidden"),
)
_ATTENTION = (
    _row("*.attn.q.weight", "self_attn.q_proj.weight", "attn_q.weight", "q", "hidden"),
    _row("*.attn.k.weight", "self_attn.k_proj.weight", "attn_k.weight", "kv", "hidden"),
    _row("*.attn.v.weight", "self_attn.v_proj.weight", "attn_v.weight", "kv", "hidden"),
    _row("*.attn.o.weight", "self_attn.o_proj.weight", "attn_output.weight", "hidden", "q"),
    _row("*.attn.q.bias", "self_attn.q_proj.bias", "attn_q.bias", "q", needs="attention_bias"),
    _row("*.attn.k.bias", "self_attn.k_proj.bias", "attn_k.bias", "kv", needs="attention_bias"),
    _row("*.attn.v.bias", "self_attn.v_proj.bias", "attn_v.bias", "kv", needs="attention_bias"),
    _row("*.attn.o.bias", "self_attn.o_proj.bias", "attn_output.bias", "hidden", needs="output_bias"),
)
_QK_NORM = (
    _row("*.attn.q_norm.weight", "self_attn.q_norm.weight", "attn_q_norm.weight", "head", needs="qk_norm"),
    _row("*.attn.k_norm.weight", "self_attn.k_norm.weight", "attn_k_norm.weight", "head", needs="qk_norm"),
)
_MLP = (
    _row("*.mlp.gate.weight", "mlp.gate_proj.weight", "ffn_gate.weight", "intermediate", "hidden"),
    _row("*.mlp.up.weight", "mlp.up_proj.weight", "ffn_up.weight", "intermediate", "hidden"),
    _row("*.mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight", "hidden", "intermediate"),
    _row("*.mlp.gate.bias", "mlp.gate_proj.bias", "ffn_gate.bias", "intermediate", needs="mlp_bias"),
    _row("*.mlp.up.bias", "mlp.up_proj.bias", "ffn_up.bias", "intermediate", needs="mlp_bias"),
    _row("*.mlp.down.bias", "mlp.down_proj.bias", "ffn_down.bias", "hidden", needs="mlp_bias"),
)
_FUSED = (
    _row("*.attn.qkv.weight", "self_attn.qkv_proj.weight", "attn_qkv.weight", "qkv", "hidden"),
    _row("*.attn.o.weight", "self_attn.o_proj.weight", "attn_output.weight", "hidden", "q"),
    _row("*.mlp.gate_up.weight", "mlp.gate_up_proj.weight", "ffn_up.weight", "gate_up", "hidden"),
    _row("*.mlp.down.weight", "mlp.down_proj.weight", "ffn_down.weight", "hidden", "intermediate"),
)

TABLES: Mapping[str, tuple[TensorRow, ...]] = MappingProxyType({
    "llama": _HEAD + _NORMS + _ATTENTION + _MLP + _TAIL,
    "qwen2": _HEAD + _NORMS + _ATTENTION + _MLP + _TAIL,
    "qwen3": _HEAD + _NORMS + _ATTENTION + _QK_NORM + _MLP + _TAIL,
    "phi3": _HEAD + _NORMS + _FUSED + _TAIL,
})  # fmt: skip
"""Architecture to its tensors, in the order in which a forward pass meets them."""


def table_of(architecture: str) -> tuple[TensorRow, ...]:
    """The rows of an architecture; UnsupportedArchitecture lists the known ones."""
    if architecture not in TABLES:
        raise UnsupportedArchitecture(f"architecture {architecture!r} is not known; known are {', '.join(TABLES)}")
    return TABLES[architecture]


def canonical_to_hf(architecture: str, name: str) -> str:
    """The Hugging Face name of a canonical one; TensorMismatch if the architecture has no such tensor."""
    return _translate(architecture, name, "canonical", "hf")


def hf_to_canonical(architecture: str, name: str) -> str:
    """The canonical name of a Hugging Face one; TensorMismatch if the architecture has no such tensor."""
    return _translate(architecture, name, "hf", "canonical")


def canonical_to_gguf(architecture: str, name: str) -> str:
    """The GGUF name of a canonical one; TensorMismatch if the architecture has no such tensor."""
    return _translate(architecture, name, "canonical", "gguf")


def gguf_to_canonical(architecture: str, name: str) -> str:
    """The canonical name of a GGUF one; TensorMismatch if the architecture has no such tensor."""
    return _translate(architecture, name, "gguf", "canonical")


def _translate(architecture: str, name: str, source: str, target: str) -> str:
    layer = _LAYER.search(name)
    pattern = _LAYER.sub("{}", name, count=1)
    row = _index(architecture, source).get(pattern) if "{" not in name else None
    if row is None:
        raise TensorMismatch(f"{name!r} is no {source} name of a tensor of architecture {architecture}")
    return str(getattr(row, target)).format(layer.group() if layer else "")


_INDEXES: dict[tuple[str, str], dict[str, TensorRow]] = {}


def _index(architecture: str, space: str) -> dict[str, TensorRow]:
    key = (architecture, space)
    if key not in _INDEXES:
        _INDEXES[key] = {getattr(row, space): row for row in table_of(architecture)}
    return _INDEXES[key]
