"""Tensors in NF4, value by value what bitsandbytes stores; `nf4_layout` says how."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smeltkit.ml.nf4_layout import BLOCK, LEVELS, SCALE_BLOCK


@dataclass(frozen=True, kw_only=True)
class Nf4:
    """A quantized tensor of `shape`: B blocks of its values in row order, the last one filled up with zeros."""

    codes: Tensor
    """Two values a byte, the first in the upper half [B, 32], uint8."""
    scale_codes: Tensor
    """Scale of each block as a code [B], uint8."""
    scale_maxima: Tensor
    """Largest magnitude of each 256 scales, less their mean [ceil(B / 256)], float32."""
    scale_mean: Tensor
    """Mean of all scales [1], float32."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Values that count."""
        return math.prod(self.shape)


def quantize(values: Tensor) -> Nf4:
    """Finite values of any float type and shape, rounded to nearest; on their device."""
    flat = values.detach().float().flatten()
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels, scale_levels = tables(values.device).split((len(LEVELS), 256))
    halves = _nearest(blocks, scales, levels)
    mean = scales.mean().view(1)
    centred = functional.pad(scales - mean, (0, -len(scales) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    maxima = centred.abs().amax(1)
    return Nf4(
        codes=halves[:, ::2] << 4 | halves[:, 1::2],
        scale_codes=_nearest(centred, maxima, scale_levels).flatten()[: len(scales)].clone(),
        scale_maxima=maxima,
        scale_mean=mean,
        shape=tuple(values.shape),
    )


@functools.cache
def tables(device: torch.device) -> Tensor:
    """The 16 levels of values and then the 256 of scales, float32, each in rising order."""
    return torch.tensor([*LEVELS, *_dynamic_levels()], dtype=torch.float32, device=device)


def _dynamic_levels() -> list[float]:
    """Levels of the dynamic type: 0, 1, and in each of seven decades below 1 twice as many as in the one below it."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        found += [*means, *(-value for value in means)]
    return sorted(found)


def _nearest(rows: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Code of the level nearest to each value of `rows` [N, block] by its row's scale [N], uint8."""
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(rows * inverse[:, None], middles, out_int32=True).to(torch.uint8)
