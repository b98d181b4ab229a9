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

    @property
    def sample_tokens(self) -> Tensor:
        """Tokens of the sample that each token belongs to [T], int64."""
        found = torch.from_numpy(np.repeat(self.lengths, self.lengths))
        return found.to(self.ids.device, non_blocking=True)

    def __len__(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens of a pack; they look at keys from the beginning of the first one's sample on."""

    begin: int
    end: int
    first: int
    """Where the sample begins in which the piece begins."""
    q_lengths: tuple[int, ...]
    """Tokens of the piece in each sample that it touches."""
    k_lengths: tuple[int, ...]
    """Tokens of each such sample up to the end of the piece."""
    q_starts: Tensor
    """Where each begins in the piece, and the end [N + 1], int32."""
    k_starts: Tensor
    """Likewise in its keys, which begin at `first`."""

    @classmethod
    def of(cls, begin: int, end: int, lengths: Sequence[int], device: torch.device | str = "cpu") -> Piece:
        """The tokens from `begin` to before `end` of a pack of samples of these lengths."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        touched = (ends > begin) & (starts < end)
        last = np.minimum(ends[touched], end)
        q_lengths, k_lengths = last - np.maximum(starts[touched], begin), last - starts[touched]
        q_starts, k_starts = (
            torch.from_numpy(np.cumsum((0, *found)).astype(np.int32)).to(device, non_blocking=True)
            for found in (q_lengths, k_lengths)
        )
        return cls(
            begin=begin,
            end=end,
            first=int(starts[touched][0]),
            q_lengths=tuple(q_lengths.tolist()),
            k_lengths=tuple(k_lengths.tolist()),
            q_starts=q_starts,
            k_starts=k_starts,
        )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
    """Causal attention of q [T, heads, D] over k and v [T, kv heads, D] within each sample; [T, heads, D].

    Samples of equal length are a batch. Others go through flash attention for variable lengths where it exists (CUDA,
    half precision), else one after the other.
    """
    lengths = batch.lengths
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        return _dense(*(x.unflatten(0, shape) for x in (q, k, v))).flatten(0, 1)
    if _is_variable(q):
        return _variable(q, k, v, (batch.starts, batch.starts), (max(lengths), max(lengths)))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_dense(*(x.unsqueeze(0) for x in part)).squeeze(0) for part in parts])


def attend_from(q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
    """As `packed_attention` for the queries of a piece of a pack, over the keys and values of the whole pack."""
    k, v = k[piece.first : piece.end], v[piece.first : piece.end]
    if _is_variable(q):
        return _variable(q, k, v, (piece.q_starts, piece.k_starts), (max(piece.q_lengths), max(piece.k_lengths)))
    parts = zip(q.split(piece.q_lengths), k.split(piece.k_lengths), v.split(piece.k_lengths), strict=True)
    return torch.cat([_last(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts])


def _last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last queries of a sample, [heads, tokens, D]."""
    tokens, seen = q.shape[1], k.shape[1]
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[0] != k.shape[0])


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, tokens, heads, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    is_fast = q.is_cuda and not torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(_FASTEST_FIRST, set_priority=True) if is_fast else nullcontext():
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    return out.transpose(1, 2)


def _is_variable(q: Tensor) -> bool:
    """Whether flash attention takes samples of any lengths in one go."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def _variable(q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int]) -> Tensor:
    """Causal attention of samples that begin at `starts` in q and in k; their ends lie at the same token."""
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler, which takes two seconds

    options = dict[str, Any]()
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch before 2.12
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, *starts, *longest, window_size=(-1, 0), **options)
    assert isinstance(out, Tensor)
    return out
