"""Models of the training benchmarks, as config.json values, and the arithmetic that a token of each costs."""

from __future__ import annotations

from typing import Any

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
    """Model FLOPs of one training token: 6 per weight of a matrix product (4 where it is frozen), causal attention.

    Matrix products are all weights but the embedding, and the head once, tied or not. Attention is 6 q S a layer and
    token (half of the full square), forward and backward. Recomputation and optimizer count nothing.
    """
    body = sum(spec.elements for spec in config.tensors() if spec.name.startswith("layers."))
    head = config.vocab_size * config.hidden_size
    attention = 6 * config.layers * config.heads * config.head_dim * tokens
    return (4 if is_lora else 6) * (body + head) + attention
