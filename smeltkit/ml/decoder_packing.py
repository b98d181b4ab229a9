"""Samples laid end to end as one row of tokens, and attention that never looks from one sample into another.

There is no padding and no mask: where each sample starts is all that attention needs to know.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Token ids of one sample."""
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""On Hopper cuDNN's attention is far ahead, but torch asks for it last; its backward pass is not deterministic."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Samples end to end. T tokens of N samples; all tensors on one device."""

    ids: Tensor
    """Token ids [T], int64."""
    positions: Tensor
    """Position of each token in its own sample [T], int64."""
    starts: Tensor
    """Where each sample begins, and T at the end [N + 1], int32."""
    lengths: tuple[int, ...]
    """Tokens of each sample, on the host: what decides kernels must not wait for the device."""

    @classmethod
    def of(cls, samples: Sequence[TokenIds], device: torch.device | str = "cpu") -> Packed:
        """Packs samples of token ids; none may be empty."""
        lengths = tuple(map(len, samples))
        assert lengths and min(lengths) > 0, "a sample without tokens cannot be packed"
        ids = np.concatenate([np.asarray(sample, dtype=np.int64) for sample in samples])
        starts = np.cumsum((0, *lengths))
        positions = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
        host = (torch.from_numpy(value) for value in (ids, positions, starts.astype(np.int32)))
        moved = [value.to(device, non_blocking=True) for value in host]
        return cls(ids=moved[0], positions=moved[1], starts=moved[2], lengths=lengths)

    def __len__(self) -> int:
        return sum(self.lengths)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    """Causal attention of q [T, heads, D] over k and v [T, kv heads, D] within each sample; [T, heads, D].

    Samples of equal length are a batch. Others go through flash attention for variable lengths where it exists (CUDA,
    half precision), else one after the other.
    """
    lengths = batch.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        return _dense(*(x.unflatten(0, shape) for x in (q, k, v))).flatten(0, 1)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _variable(q, k, v, batch)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_dense(*(x.unsqueeze(0) for x in part)).squeeze(0) for part in parts])


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, tokens, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    is_fast = q.is_cuda and not torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True) if is_fast else nullcontext():
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    return out.transpose(1, 2)


def _variable(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, which takes two seconds

    longest, options = max(batch.lengths), dict[str, Any]()
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.12
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, batch.starts, batch.starts, longest, longest, window_size=(-1, 0), **options)
    assert isinstance(out, Tensor)
    return out
