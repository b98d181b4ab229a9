"""Layers that several processes compute together, each its heads, its part of the MLP and of the vocabulary.

After Megatron-LM (Shoeybi et al., arXiv:1909.08053): what enters attention or MLP is whole in every process, its first
products are split by outputs and its last by inputs, so that what leaves is a sum over the processes. One sum forward
and one backward for each of both, and kernels see plain tensors. Parameters are DTensors, so that FSDP2, optimizer and
checkpoints know what they are parts of.

The embedding and the head are split by words, as large a part of a small model as they are; logits are never gathered.
What is whole in every process gets the same gradient in each: from sums that are the same number for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional

from services.trainer.adapters.lora import LoraLinear
from services.trainer.parallel.collectives import exchanged, gathered, summed
from services.trainer.parallel.splits import axes_of
from smeltkit.ml.decoder import Decoder, Mlp, RmsNorm, SelfAttention
from smeltkit.ml.decoder_targets import IGNORED


def split(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Leaves of `decoder`, the same in every process of `mesh`, with or without adapters, the part of this one.

    Losses and hidden states are then those of the whole; what `forward` returns are the logits of this process's words.
    """
    group, axes = mesh.get_group(), axes_of(decoder.config, mesh.size())
    for name, block in decoder.named_modules():
        if not isinstance(block, SelfAttention | Mlp):
            continue
        for inner, module in list(block.named_modules(prefix=name)):
            if kind := _KINDS.get(type(module)):
                _divide(module, kind, axes[f"{inner.removesuffix('.base')}.weight"], mesh)
        block.register_forward_pre_hook(lambda _, given: (_enter(given[0], group), *given[1:]))
        block.register_forward_hook(lambda _, given, found: _leave(found, group))
    for module in (decoder.embed, *([] if decoder.config.tie_embeddings else [decoder.lm_head])):
        _divide(module, _KINDS[type(module)], 0, mesh)
    decoder.norm.register_forward_hook(lambda _, given, found: _enter(found, group))
    words = _Words(decoder.kernels.softmax_gradient, group, decoder.config.vocab_size // mesh.size())
    decoder.kernels = replace(decoder.kernels, softmax_gradient=words)


class _Part(nn.Module):
    """A module that computes with what this process holds of each parameter, a plain tensor.

    While FSDP2 has given a parameter away, it is what FSDP2 finds.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return _held(value) if isinstance(value, DTensor) and value.device_mesh.ndim == 1 else value


class _PartLinear(_Part, nn.Linear):
    """Some of the outputs, of whole inputs; or, split by inputs, a summand of all outputs, the bias in one of them."""

    has_bias = True

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        is_left_out = name == "bias" and not self.has_bias and not isinstance(value, DTensor | None)
        return value * 0 if is_left_out else value


class _PartLora(_Part, LoraLinear):
    """The adapter of a `_PartLinear`."""


class _PartNorm(_Part, RmsNorm):
    """The norm of each of this process's heads."""


class _PartEmbedding(_Part, nn.Embedding):
    """Looks up its own words and sums over the processes, of which but one has found a word."""

    group: dist.ProcessGroup

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [T, hidden] of ids [T]."""
        weight, group = self.weight, self.group
        own = ids - dist.get_rank(group) * len(weight)
        is_own = (own >= 0) & (own < len(weight))
        return _leave(functional.embedding(own.where(is_own, 0), weight) * is_own.unsqueeze(1), group)


_KINDS: dict[type[nn.Module], type[_Part]] = {
    nn.Linear: _PartLinear, LoraLinear: _PartLora, RmsNorm: _PartNorm, nn.Embedding: _PartEmbedding,
}  # fmt: skip


def _divide(module: nn.Module, kind: type[_Part], axis: int | None, mesh: DeviceMesh) -> None:
    """Makes a module one of `kind`, with its part of a weight that is split along `axis`; None: of heads."""
    outputs, inputs = (0 if axis == 0 else None), (1 if axis == 1 else None)
    axes = {"weight": axis, "bias": outputs, "a": inputs, "b": outputs}
    for name, value in list(module.named_parameters(recurse=False)):
        found = _spread(value, axes[name], mesh)
        setattr(module, name, nn.Parameter(found, requires_grad=value.requires_grad))
    module.__class__ = kind
    if isinstance(module, _PartLinear):
        module.out_features, module.in_features = module.weight.shape
        module.has_bias = axis == 0 or mesh.get_local_rank() == 0
    if isinstance(module, _PartEmbedding):
        module.group = mesh.get_group()


def _spread(value: Tensor, axis: int | None, mesh: DeviceMesh) -> DTensor:
    """A tensor that every process has, split along `axis` or, for None, left whole in each."""
    own = value.detach()
    if axis is not None:
        own = own.chunk(mesh.size(), axis)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, [Replicate() if axis is None else Shard(axis)], run_check=False)


def _held(value: DTensor) -> Tensor:
    """What this process holds of a parameter; of one that is whole, with a gradient that is summed over all."""
    if not value.requires_grad:
        with torch.no_grad():
            return value.to_local()
    part = value.to_local()
    return _enter(part, value.device_mesh.get_group("tensor")) if value.placements[-1].is_replicate() else part


def _enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which every process has; its gradient is the sum over what each makes of it."""
    return exchanged(x, lambda whole: whole.view_as(whole), lambda upstream: summed(upstream, group))


def _leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the processes; its gradient is that of every summand."""
    return exchanged(x, lambda summand: summed(summand, group), lambda upstream: upstream)


class _Words:
    """`Kernels.softmax_gradient` where each process has the logits of its own words, `count` of them.

    The losses are those over all words, the same in every process. A process's own sum of exponentials follows from
    its kernel's loss and the logit that this was made with; the sums of all give the factor between its softmax and
    its part of the whole one.
    """

    def __init__(self, kernel: Any, group: dist.ProcessGroup, count: int) -> None:
        self._kernel, self._group = kernel, group
        self._first, self._count = dist.get_rank(group) * count, count

    def __call__(self, logits: Tensor, targets: Tensor, divisor: int = 1) -> Tensor:
        """Losses [C] of logits [C, count] by targets [C]; the logits become their part of the gradient, divided."""
        own = targets - self._first
        is_own, is_counted = (own >= 0) & (own < self._count), targets != IGNORED
        place = own.where(is_own, 0)
        chosen = logits.gather(1, place.unsqueeze(1)).squeeze(1)
        losses = self._kernel(logits, place.where(is_counted, IGNORED), divisor)
        chosen = chosen.to(losses.dtype)
        own_sum = losses + chosen
        told = gathered(torch.stack((own_sum, chosen * is_own)), self._group)
        log_sum, picked = told[::2].logsumexp(0), told[1::2].sum(0)
        logits.mul_((own_sum - log_sum).exp().unsqueeze(1))
        # Half precision has lost what is small beside the 1 that was taken off here.
        exact = ((chosen - log_sum).exp() - is_own.to(chosen.dtype)) * is_counted / divisor
        logits.scatter_(1, place.unsqueeze(1), exact.to(logits.dtype).unsqueeze(1))
        return (log_sum - picked) * is_counted
