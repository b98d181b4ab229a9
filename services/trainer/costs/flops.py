"""Model FLOPs of a training, and the rate of a matrix product that they are held against (MFU).

    MFU = model FLOPs of a step / (its seconds x FLOP/s of a large matrix product on this device, in this type)

Model FLOPs of one token are 6 for each weight of a matrix product (2 forward, 4 backward; 4 where the weight is frozen
and has no gradient of its own) and 6 q S a layer for causal attention in a sample of S tokens, q being the width of all
query heads. Matrix products are all weights but the embedding, and the head once, tied or not. What recomputation,
adapters and the optimizer do counts nothing (Chowdhery et al., arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable

from smeltkit.ml.arch import ModelConfig


def model_flops(config: ModelConfig, lengths: Iterable[int], *, is_adapted: bool) -> float:
    """FLOPs of training on samples of these lengths in tokens, forward and backward."""
    counts = list(lengths)
    body = sum(spec.elements for spec in config.tensors() if spec.name.startswith("layers."))
    products = (4 if is_adapted else 6) * (body + config.vocab_size * config.hidden_size)
    attention = 6 * config.layers * config.heads * config.head_dim
    return float(products * sum(counts) + attention * sum(length * length for length in counts))
