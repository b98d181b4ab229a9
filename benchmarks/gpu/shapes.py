"""Models of the training benchmarks, as config.json values, and what a token of each costs."""

from __future__ import annotations

from typing import Any

from services.trainer.costs.flops import model_flops
from smeltkit.ml.arch import ModelConfig

TOKENS = 2048
"""Tokens of a sequence."""


def _qwen2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "vocab_size": vocab, "tie_word_embeddings": tied, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "350M": _qwen2(1024, 24, 16, 16, 2816, 32768, False),
    "1.5B": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "7B": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
}
"""350M as small code models are built; 1.5B and 7B have the dimensions of Qwen2.5."""


def flops_per_token(config: ModelConfig, *, is_lora: bool, tokens: int = TOKENS) -> float:
    """Model FLOPs of one token in a sample of `tokens`, as the trainer counts them."""
    return model_flops(config, [tokens], is_adapted=is_lora) / tokens
