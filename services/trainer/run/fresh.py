"""Weights to begin a pre-training with.

Matrices are normal with a deviation of 0.02, those that write to the residual stream divided by the root of the number
of such writes (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3); norms are one
and biases zero. Drawn on the CPU in float32, tensor by tensor, so that a seed means the same weights on every device.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from smeltkit.ml.arch import ModelConfig, TensorSpec
from smeltkit.ml.decoder import Decoder

DEVIATION: Final = 0.02
_WRITES: Final = (".attn.o.weight", ".mlp.down.weight")


def fresh_decoder(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, device: torch.device | str, **options: Any
) -> Decoder:
    """A decoder with the random weights of `seed`; `options` as for Decoder."""
    generator = torch.Generator().manual_seed(seed)
    state = {spec.name: _drawn(spec, config, generator).to(device=device, dtype=dtype) for spec in config.tensors()}
    with torch.device("meta"):
        decoder = Decoder(config, **options)
    decoder.load_state_dict(state, assign=True)
    return decoder


def _drawn(spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> Tensor:
    if len(spec.shape) == 1:
        return torch.zeros(spec.shape) if spec.name.endswith(".bias") else torch.ones(spec.shape)
    share = 1 / math.sqrt(2 * config.layers) if spec.name.endswith(_WRITES) else 1.0
    return torch.empty(spec.shape).normal_(0.0, DEVIATION * share, generator=generator)
