"""The one torch decoder: llama, qwen2, qwen3 and phi3, as `smeltkit.ml.arch` declares them.

A forward pass takes a row of packed samples. Kernels, attention and linear layers are injected, so that a trainer
(autograd, adapters) and an engine (cached keys and values, quantized linears) run the same model code. Parameters have
canonical names, so a state dict is the list of `ModelConfig.tensors()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder_linears import gated, side_by_side
from smeltkit.ml.decoder_packing import Packed, packed_attention
from smeltkit.ml.decoder_rope import cos_sin
from smeltkit.ml.kernels import REFERENCE, Kernels
from smeltkit.ml.kernels.cross_entropy import linear_cross_entropy, token_losses

MakeLinear = Callable[[int, int, bool], nn.Module]
"""(inputs, outputs, has a bias) to a layer."""
Attention = Callable[[Tensor, Tensor, Tensor, Packed], Tensor]
"""As `packed_attention`."""
Noise = Callable[[Tensor, Packed], Tensor]
"""Embeddings [T, hidden] of packed samples to what is added to them."""


class Decoder(nn.Module):
    """A decoder-only transformer over packed samples, on the device and in the type of its parameters."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        kernels: Kernels = REFERENCE,
        make_linear: MakeLinear = nn.Linear,
        attention: Attention = packed_attention,
        sequence_tokens: int = 0,
    ) -> None:
        """Random weights. `sequence_tokens` is the longest sample to come (0: the model's context), see `cos_sin`."""
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.sequence_tokens = sequence_tokens or config.context_tokens
        self.recomputes = False
        """Whether a layer's activations are computed again in the backward pass instead of being kept."""
        self.noise: Noise | None = None
        """What is added to embeddings while training, if anything is."""
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kernels, make_linear, attention) for _ in range(config.layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, kernels)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [vocab, hidden] that makes logits of hidden states."""
        return self.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def hidden(self, batch: Packed) -> Tensor:
        """Hidden states [T, hidden] after the last norm."""
        x: Tensor = self.embed(batch.ids)
        if self.noise is not None and self.training:
            x = x + self.noise(x, batch)
        cos, sin = cos_sin(self.config, batch.positions, sequence_tokens=self.sequence_tokens)
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, batch, use_reentrant=False)
            else:
                x = layer(x, cos, sin, batch)
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, batch: Packed) -> Tensor:
        """Logits [T, vocab]. For a loss use `loss`, which never holds them."""
        return functional.linear(self.hidden(batch), self.head_weight)

    def loss(self, batch: Packed, targets: Tensor, divisor: int = 1) -> Tensor:
        """Cross-entropy summed over the targets [T] that are not IGNORED, over `divisor`; in float32 at least."""
        hidden = self.hidden(batch)
        return linear_cross_entropy(hidden, self.head_weight, targets, divisor=divisor, kernels=self.kernels)

    @torch.no_grad()
    def token_losses(self, batch: Packed, targets: Tensor) -> Tensor:
        """Cross-entropy of every token [T], 0 where the target is IGNORED."""
        return token_losses(self.hidden(batch), self.head_weight, targets, kernels=self.kernels)


class Layer(nn.Module):
    """One block: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, kernels: Kernels, make_linear: MakeLinear, attention: Attention) -> None:
        super().__init__()
        self.attn_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.attn = SelfAttention(config, kernels, make_linear, attention)
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.mlp = Mlp(config, kernels, make_linear)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Packed) -> Tensor:
        """The residual stream [T, hidden] after this layer."""
        x = x + self.attn(self.attn_norm(x), cos, sin, batch)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions, with or without fused projections, biases and norms of heads."""

    def __init__(self, config: ModelConfig, kernels: Kernels, make_linear: MakeLinear, attention: Attention) -> None:
        super().__init__()
        self._config, self._kernels = config, kernels
        self.attention = attention
        """What looks from each token at those before it; may be replaced."""
        size = config.dimensions()
        if config.fused_projections:
            self.qkv = make_linear(size["hidden"], size["qkv"], config.attention_bias)
        else:
            self.q = make_linear(size["hidden"], size["q"], config.attention_bias)
            self.k = make_linear(size["hidden"], size["kv"], config.attention_bias)
            self.v = make_linear(size["hidden"], size["kv"], config.attention_bias)
        self.o = make_linear(size["q"], size["hidden"], config.output_bias)
        if config.qk_norm:
            self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps, kernels)
            self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps, kernels)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Packed) -> Tensor:
        """What attention adds to the residual stream [T, hidden]."""
        q, k, v = (part.unflatten(-1, (-1, self._config.head_dim)) for part in self._project(x))
        if self._config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._kernels.rotate(q, cos, sin), self._kernels.rotate(k, cos, sin)
        out: Tensor = self.o(self.attention(q, k, v, batch).flatten(-2))
        return out

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self._config.fused_projections:
            return side_by_side(x, self.q, self.k, self.v)
        size = self._config.dimensions()
        parts: tuple[Tensor, ...] = self.qkv(x).split((size["q"], size["kv"], size["kv"]), dim=-1)
        return parts


class Mlp(nn.Module):
    """The gated feed-forward part."""

    def __init__(self, config: ModelConfig, kernels: Kernels, make_linear: MakeLinear) -> None:
        super().__init__()
        self._is_fused, self._kernels = config.fused_projections, kernels
        hidden, inner = config.hidden_size, config.intermediate_size
        if config.fused_projections:
            self.gate_up = make_linear(hidden, 2 * inner, config.mlp_bias)
        else:
            self.gate = make_linear(hidden, inner, config.mlp_bias)
            self.up = make_linear(hidden, inner, config.mlp_bias)
        self.down = make_linear(inner, hidden, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream [T, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1) if self._is_fused else side_by_side(x, self.gate, self.up)
        return gated(gate, up, self.down, self._kernels)


class RmsNorm(nn.Module):
    """Root mean square norm with a weight a dimension."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps, self._kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] normed, in its type."""
        return self._kernels.rms_norm(x, self.weight, self._eps)
