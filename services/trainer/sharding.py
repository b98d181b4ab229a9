"""A decoder whose parameters are spread over the processes of a training, by torch's FSDP2.

Each layer is gathered when it is needed, forward and backward, and given away again; gradients are summed into the
part that a process holds, unscaled, because every loss is a share of the whole step's already. Frozen and trainable
parameters, in NF4 or not, are spread alike.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from services.trainer.ranks import Ranks
from smeltkit.ml.decoder import Decoder


def shard(decoder: Decoder, ranks: Ranks) -> None:
    """Spreads the parameters of `decoder`, the same in every process, over all that joined; nothing for one alone."""
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(ranks.device, (ranks.count,))
    for module in (*decoder.layers, decoder):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(decoder, "loss")


@torch.no_grad()
def held(value: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient; of one that is not spread, all."""
    return value.detach().to_local() if isinstance(value, DTensor) else value


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what is spread as `like` is, on the CPU of the first process; to be called in all of them.

    What is not spread, all scalars among it, is returned as it is.
    """
    if not isinstance(like, DTensor) or not part.dim():
        return part
    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    full = spread.full_tensor()
    return full.cpu() if like.device_mesh.get_rank() == 0 else full.new_empty(0)


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of `value` once it is spread as `like` is: the way back from `whole`."""
    if not isinstance(like, DTensor) or not value.dim():
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()
