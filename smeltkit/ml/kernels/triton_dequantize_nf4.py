"""NF4 to weights in one pass: half a byte read and one weight written a value, the scales decoded on the way.

For the row counts of training, a product with a whole dequantized matrix is as fast as one with a plain matrix; a fused
product would dequantize each tile again for every tile of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smeltkit.ml.nf4 import Nf4, tables
from smeltkit.ml.nf4_layout import BLOCK, LEVELS, SCALE_BLOCK

_ROWS, _WARPS = 32, 1


def dequantize_nf4(weight: Nf4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """As `reference.dequantize_nf4` to the last bit, for tensors on a CUDA device."""
    blocks, per_line = len(weight.codes), 0
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    elif not out.is_contiguous():
        if weight.shape[1] % BLOCK or out.stride(1) != 1:
            return out.copy_(dequantize_nf4(weight, dtype))
        per_line = weight.shape[1] // BLOCK
    _dequantize[(triton.cdiv(blocks, _ROWS),)](
        weight.codes, weight.scale_codes, weight.scale_maxima, weight.scale_mean, tables(out.device), out, blocks,
        weight.size, per_line, out.stride(0) if out.dim() else 0,
        ROWS=_ROWS, HALF=BLOCK // 2, SCALE_BLOCK=SCALE_BLOCK, LEVELS=len(LEVELS), IS_DENSE=per_line == 0,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize(
    codes: tl.tensor,
    scale_codes: tl.tensor,
    scale_maxima: tl.tensor,
    scale_mean: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    blocks: int,
    size: int,
    per_line: int,
    stride: int,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    IS_DENSE: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < blocks
    code = tl.load(scale_codes + row, mask=inside, other=0).to(tl.int32)
    largest = tl.load(scale_maxima + row // SCALE_BLOCK, mask=inside, other=0.0)
    scale = (tl.load(levels + LEVELS + code) * largest + tl.load(scale_mean))[:, None]
    place = row.to(tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(codes + place, mask=inside[:, None], other=0).to(tl.int32)
    values = tl.interleave(tl.load(levels + (pair >> 4)) * scale, tl.load(levels + (pair & 15)) * scale)
    column = tl.arange(0, 2 * HALF)[None, :]
    begin = row.to(tl.int64) * (2 * HALF)
    is_value = begin[:, None] + column < size
    if not IS_DENSE:
        line = row // per_line
        begin = line.to(tl.int64) * stride + (row - line * per_line) * (2 * HALF)
    tl.store(out + begin[:, None] + column, values, mask=is_value)
