"""Noise on the embeddings of a training (NEFTune, Jain et al., arXiv:2310.05914).

To each value of the embedding of a token, in a sample of L tokens of width d, a number is added that is uniform between
-alpha / sqrt(L d) and alpha / sqrt(L d). It is drawn from torch's generator, whose state checkpoints keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smeltkit.ml.decoder import Noise
from smeltkit.ml.decoder_packing import Packed


def noise_of(alpha: float) -> Noise:
    """What a decoder adds to embeddings [T, d] of packed samples while it is trained."""

    def noise(x: Tensor, batch: Packed) -> Tensor:
        bounds = alpha / torch.sqrt(batch.sample_tokens.float() * x.shape[1])
        return torch.empty_like(x).uniform_(-1, 1) * bounds.to(x.dtype).unsqueeze(1)

    return noise
