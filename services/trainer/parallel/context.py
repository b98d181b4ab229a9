"""A pack whose tokens several processes share, and attention from each one's tokens over the keys of all.

A pack is cut into twice as many pieces as there are processes. Each takes one from the front and its counterpart from
the back, so that in one long sample all look at as many keys. Keys and values of all are gathered before attention, and
the gradients that each has for them summed and given back, as Llama 3 was trained (arXiv:2407.21783, 3.3.2). All else
is computed on a process's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.parallel.collectives import exchanged, gathered, scattered
from services.trainer.parallel.ranks import Ranks
from services.trainer.run.step import Pack
from smeltkit.ml.decoder import Decoder, SelfAttention
from smeltkit.ml.decoder_packing import Packed, Piece, attend_from
from smeltkit.ml.decoder_targets import IGNORED


@dataclass(frozen=True, kw_only=True)
class PackedPart(Packed):
    """Two pieces of a pack: `ids` and `positions` are theirs, `starts` and `lengths` those of the whole pack.

    The pack is filled up by a sample of its own until it can be cut evenly.
    """

    pieces: tuple[Piece, ...]
    tokens: int
    """Those that are not filled in."""

    @property
    def sample_tokens(self) -> Tensor:
        """Tokens of the whole sample that each of these tokens belongs to [T], int64."""
        whole = super().sample_tokens
        return torch.cat([whole[piece.begin : piece.end] for piece in self.pieces])

    def __len__(self) -> int:
        return self.tokens


def own_part(pack: Pack, ranks: Ranks) -> Pack:
    """What one of the processes that share a pack takes of it; all of it where none does."""
    if ranks.context == 1:
        return pack
    batch, cuts = pack.batch, 2 * ranks.context
    tokens, device = len(batch), batch.ids.device
    fill = -tokens % cuts
    size, lengths = (tokens + fill) // cuts, (*batch.lengths, *((fill,) if fill else ()))
    begins = [number * size for number in (ranks.part, cuts - 1 - ranks.part)]

    def mine(values: Tensor, filling: Tensor) -> Tensor:
        filled = torch.cat((values, filling.to(values)))
        return torch.cat([filled[begin : begin + size] for begin in begins])

    targets = mine(pack.targets, torch.full((fill,), IGNORED))
    part = PackedPart(
        ids=mine(batch.ids, torch.zeros(fill)),
        positions=mine(batch.positions, torch.arange(fill)),
        starts=batch.starts,
        lengths=lengths,
        pieces=tuple(Piece.of(begin, begin + size, lengths, device) for begin in begins),
        tokens=sum(min(max(tokens - begin, 0), size) for begin in begins),
    )
    return Pack(batch=part, targets=targets, counted=int((targets != IGNORED).sum()), is_idle=pack.is_idle)


def attend_across(decoder: Decoder, group: dist.ProcessGroup) -> None:
    """Lets the layers of `decoder` take a PackedPart, whose other parts are in the other processes of `group`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, batch: Packed) -> Tensor:
        assert isinstance(batch, PackedPart), "a whole pack in a decoder that takes parts"
        keys, values = _in_order(torch.cat((k, v), dim=-1), group).chunk(2, dim=-1)
        own = zip(q.chunk(len(batch.pieces)), batch.pieces, strict=True)
        return torch.cat([attend_from(part, keys, values, piece) for part, piece in own])

    for module in decoder.modules():
        if isinstance(module, SelfAttention):
            module.attention = attention


def _in_order(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes in the order of the pack, of x [2 n, ...] with the two pieces of this one."""
    size = len(x) // 2

    def there(own: Tensor) -> Tensor:
        first, last = gathered(own, group).unflatten(0, (-1, 2, size)).unbind(1)
        return torch.cat((first, last.flip(0))).flatten(0, 1)

    def back(upstream: Tensor) -> Tensor:
        first, last = upstream.unflatten(0, (2, -1, size))
        return scattered(torch.stack((first, last.flip(0)), dim=1).flatten(0, 2), group)

    return exchanged(x, there, back)
