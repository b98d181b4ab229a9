"""Linear layer and cross-entropy in one: the logits of a few hundred tokens exist at a time, never those of all.

For each chunk of tokens the logits are made, turned into losses and their own gradient in place, and multiplied away:
dX = G W and dW += G^T X. So the backward pass only scales what the forward pass has found, and not even that where the
loss is where it begins. With a frozen head the product for dW, a third of the work, is left out. The idea is from Liger
(arXiv:2410.10989). On a GPU both products of a chunk run beside each other: neither fills all of it to its end.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from smeltkit.ml.kernels import REFERENCE, Kernels

CHUNK_BYTES = 320_000_000
"""Upper bound of the logits that exist at a time: 1,024 tokens by 152 thousand words in half precision."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: int = 1,
    kernels: Kernels = REFERENCE,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The summed loss of logits hidden [T, H] @ weight [V, H]^T by targets [T] over `divisor`, a float32 scalar.

    Of float64 it is one of float64. Targets equal to IGNORED count nothing. Differentiable once, by hidden and weight:
    the backward pass gives its memory away, so it cannot run a second time. What is divided by here is divided exactly,
    and costs nothing; what comes from above is one more pass over the gradients.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, divisor, kernels, chunk_bytes)  # type: ignore[no-untyped-call]
    return total


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, *, kernels: Kernels = REFERENCE) -> Tensor:
    """The loss of every token [T], 0 where ignored; no gradient, in the same bounded memory."""
    with torch.no_grad():
        chunks = _chunks(hidden, weight, CHUNK_BYTES)
        found = [kernels.softmax_gradient(hidden[part] @ weight.T, targets[part]) for part in chunks]
    return torch.cat(found)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, divisor: int, kernels: Kernels, chunk_bytes: int
    ) -> Tensor:
        """See `linear_cross_entropy`."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        by_hidden = torch.empty_like(hidden) if needs_hidden else None
        by_weight = torch.empty_like(weight) if needs_weight else None
        parts, losses = _chunks(hidden, weight, chunk_bytes), []
        buffer = hidden.new_empty(parts[0].stop, weight.shape[0])
        main = torch.cuda.current_stream(hidden.device) if hidden.is_cuda and needs_weight else None
        side = _side_stream(hidden.device) if main else None
        for part in parts:
            scores = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - part.start])
            losses.append(kernels.softmax_gradient(scores, targets[part], divisor))
            if main and side:
                side.wait_stream(main)
            if by_weight is not None:
                with torch.cuda.stream(side) if side else nullcontext():
                    torch.addmm(by_weight, scores.T, hidden[part], beta=0 if part.start == 0 else 1, out=by_weight)
            if by_hidden is not None:
                torch.mm(scores, weight, out=by_hidden[part])
            if main and side:
                main.wait_stream(side)
        ctx.found, ctx.kernels = (by_hidden, by_weight), kernels
        return torch.cat(losses).sum() / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients found, scaled in place by what comes from above: a copy would be as large as the head."""
        assert ctx.found is not None, "the gradients of a fused loss were given away; a second backward has none"
        found, ctx.found = ctx.found, None
        for grad in found:
            if grad is not None:
                ctx.kernels.rescale(grad, upstream)
        return (*found, None, None, None, None)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all time: the library for products keeps a buffer for each stream that it sees."""
    return torch.cuda.Stream(device)


def _chunks(hidden: Tensor, weight: Tensor, chunk_bytes: int) -> list[slice]:
    """Slices of tokens, as even as possible and each a multiple of 128 but the last."""
    tokens, row_bytes = len(hidden), weight.shape[0] * hidden.element_size()
    size = max(128, chunk_bytes // row_bytes // 128 * 128)
    return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
