"""NF4: weights of four bits each with scales of eight, known without torch.

A block of 64 values is divided by its largest magnitude, its scale, and each quotient becomes the nearest of sixteen
levels, quantiles of a normal distribution (Dettmers et al., arXiv:2305.14314, appendix E). The scales, less their mean,
are stored likewise ("double quantization"): blocks of 256, levels of the signed dynamic 8-bit type (Dettmers,
arXiv:1511.04561). A weight costs 4 + 8 / 64 + 32 / (64 * 256) bits.
"""

from __future__ import annotations

from typing import Final

BLOCK: Final = 64
"""Values that share a scale."""
SCALE_BLOCK: Final = 256
"""Scales that share their largest magnitude."""
LEVELS: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published table, code 0 first."""


def stored_bytes(size: int) -> int:
    """Bytes of a quantized tensor of `size` values."""
    blocks = -(-size // BLOCK)
    return blocks * (BLOCK // 2 + 1) + 4 * -(-blocks // SCALE_BLOCK) + 4
