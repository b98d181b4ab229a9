"""Numbers in 8 bits by blocks of 256: what an optimizer keeps its moments in, 1 byte a value and 4 a block.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861): a block is divided by its largest
absolute value, and what is left is rounded to the nearest of 256 numbers that stand closer together near zero (dynamic
quantization, section 1.3 there). What is not zero never becomes zero by rounding where all are positive: it divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 256
_DECADES: Final = 7


@dataclass(frozen=True, kw_only=True)
class Coded:
    """n values in 8 bits."""

    codes: Tensor
    """[n], uint8."""
    scales: Tensor
    """Largest absolute value of each block [ceil(n / BLOCK)], float32."""
    is_signed: bool
    """Whether values can be negative."""

    def part(self, begin: int, end: int) -> Coded:
        """Views of the values from `begin`, a multiple of BLOCK, to before `end`."""
        scales = self.scales[begin // BLOCK : -(-end // BLOCK)]
        return Coded(codes=self.codes[begin:end], scales=scales, is_signed=self.is_signed)

    def values(self) -> Tensor:
        """In float32 [n]."""
        spread = self.scales.repeat_interleave(BLOCK)[: self.codes.numel()]
        return book(self.is_signed, self.codes.device.type)[0][self.codes.int()] * spread

    def write(self, values: Tensor) -> None:
        """Replaces the values by others [n], rounded to the nearest."""
        _, middles = book(self.is_signed, values.device.type)
        blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(scaled, middles, out_int32=True)
        if not self.is_signed:
            codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
        self.codes.copy_(codes.view(-1)[: values.numel()])
        self.scales.copy_(scales)


def zeros(count: int, *, is_signed: bool, device: torch.device) -> Coded:
    """`count` zeros."""
    zero = int(torch.searchsorted(book(is_signed, "cpu")[0], torch.zeros(())))
    return Coded(
        codes=torch.full((count,), zero, dtype=torch.uint8, device=device),
        scales=torch.zeros(-(-count // BLOCK), device=device),
        is_signed=is_signed,
    )


@cache
def book(is_signed: bool, device: str) -> tuple[Tensor, Tensor]:
    """The 256 numbers that codes stand for, ascending, within -1 to 1 or 0 to 1, and the 255 middles between them.

    Each decade down to 1e-6 has half as many as the one above it, in the middle of equal steps; then 0 and 1.
    """
    first = 1 if is_signed else 2
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, first * 2**decade + 1, dtype=torch.float64)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)).tolist()
        found += means + ([-mean for mean in means] if is_signed else [])
    numbers = torch.tensor(sorted(found), dtype=torch.float32, device=device)
    return numbers, (numbers[1:] + numbers[:-1]) / 2
