"""A decoder whose parameters are spread over the processes of a training, by torch's FSDP2.

Each layer is gathered when it is needed, forward and backward, and given away again after each. Gradients are summed
into the part that a process holds, unscaled, because every loss is a share of the whole step's already. Frozen weights
are spread like others; those in NF4, an eighth of the memory, are whole in every process.

Torch's modules for this take seconds to load, so a training of one process does without them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.ranks import Ranks
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import Nf4Linear


def shard(decoder: Decoder, ranks: Ranks, *, regathers: bool = True) -> None:
    """Spreads the parameters of `decoder`, the same in every process, over all that joined; nothing for one alone.

    Unless it `regathers`, a layer stays whole from the forward to the backward pass, and what is frozen always.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device, (ranks.count,))
    kept = [module for module in decoder.modules() if isinstance(module, Nf4Linear)] if regathers else [decoder]
    ignored = {value for module in kept for value in module.parameters() if not value.requires_grad}
    for module in (*decoder.layers, decoder):
        again = regathers and module is not decoder
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=ignored)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(decoder, "loss")


def is_spread(value: Tensor) -> bool:
    """Whether a parameter or gradient is a DTensor."""
    return hasattr(value, "device_mesh")


@torch.no_grad()
def held(value: Any) -> Tensor:
    """What this process holds of a parameter or gradient; of one that is not spread, all."""
    part: Tensor = value.detach().to_local() if is_spread(value) else value
    return part


def whole(part: Tensor, like: Any) -> Tensor:
    """The whole of what is spread as `like` is, on the CPU of the first process; to be called in all of them.

    What is not spread, all scalars among it, is returned as it is.
    """
    if not is_spread(like) or not part.dim():
        return part
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    full = spread.full_tensor()
    return full.cpu() if like.device_mesh.get_rank() == 0 else full.new_empty(0)


def part_of(value: Tensor, like: Any) -> Tensor:
    """What this process holds of `value` once it is spread as `like` is: the way back from `whole`."""
    if not is_spread(like) or not value.dim():
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()
