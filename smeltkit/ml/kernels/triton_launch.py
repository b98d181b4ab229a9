"""What every Triton launch here shares: the type that sums are made in, and shapes padded to powers of two."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def exact_type(x: Tensor) -> Any:
    """float64 for float64, else float32: the type of sums, also of half-precision values."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def block_of(size: int) -> int:
    """The smallest power of two that holds `size`."""
    found: int = triton.next_power_of_2(size)
    return found


def warps_of(block: int) -> int:
    """Warps a program that works on `block` values."""
    return min(max(block // 512, 1), 16)


def rows_of(x: Tensor) -> Tensor:
    """x [..., H] as rows [N, H] whose values lie side by side; a copy only where it must be one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
