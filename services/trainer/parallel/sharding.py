"""A decoder whose parameters are spread over the processes of a training, by torch's FSDP2.

Each layer is gathered when it is needed, forward and backward, and given away again after each. Gradients are summed
into the part that a process holds, unscaled, because every loss is a share of the whole step's already. Frozen weights
are spread like others; those in NF4, an eighth of the memory, are whole in every process. Of layers that several
processes compute together it is each one's part that is spread, over those that hold the same one.

Torch's modules for this take seconds to load, so a training of one process does without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from services.trainer.parallel.ranks import Ranks
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_nf4 import Nf4Linear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_TENSOR: Final = "tensor"
"""Dimension of a mesh along which layers are split; the last one."""


def shard(decoder: Decoder, ranks: Ranks, *, regathers: bool = True) -> None:
    """Spreads the parameters of `decoder`, the same in every process, over all that joined; nothing for one alone.

    Unless it `regathers`, a layer stays whole from the forward to the backward pass, and what is frozen always. What
    `ranks` says of layers and packs that are shared is done as well: see `tensor_parallel` and `context_parallel`.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.device_mesh import init_device_mesh

    shards = ranks.count // ranks.tensor
    mesh = init_device_mesh(ranks.device, (shards, ranks.tensor), mesh_dim_names=("shards", _TENSOR))
    if ranks.tensor > 1:
        from services.trainer.parallel.tensor import split

        split(decoder, mesh[_TENSOR])
    if ranks.context > 1:
        from services.trainer.parallel.context import attend_across

        shape = (ranks.replicas, ranks.context, ranks.tensor)
        names = ("replicas", "context", _TENSOR)
        attend_across(decoder, init_device_mesh(ranks.device, shape, mesh_dim_names=names).get_group("context"))
    if shards > 1 or ranks.count == 1:
        _spread(decoder, mesh["shards"], regathers)


def _spread(decoder: Decoder, mesh: DeviceMesh, regathers: bool) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    kept = [module for module in decoder.modules() if isinstance(module, Nf4Linear)] if regathers else [decoder]
    ignored = {value for module in kept for value in module.parameters() if not value.requires_grad}
    for module in (*decoder.layers, decoder):
        again = regathers and module is not decoder
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=ignored)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ("loss", "token_losses"):
        register_fsdp_forward_method(decoder, name)


def is_spread(value: Tensor) -> bool:
    """Whether a parameter or gradient is a DTensor."""
    return hasattr(value, "device_mesh")


def is_told(value: Any, ranks: Ranks) -> bool:
    """Whether this process counts what it holds of a parameter, in sums in which each value counts once."""
    is_split = is_spread(value) and value.device_mesh.mesh_dim_names[-1] == _TENSOR
    return ranks.is_teller or (is_split and not value.placements[-1].is_replicate())


@torch.no_grad()
def held(value: Any) -> Tensor:
    """What this process holds of a parameter or gradient; of one that is not spread, all."""
    part: Tensor = value.to_local().detach() if is_spread(value) else value
    return part


def spread_as(part: Tensor, like: Any) -> Tensor:
    """The tensor of which this process holds `part`, spread as `like` is; what is not spread, or a scalar, as it is."""
    if not is_spread(like) or not part.dim():
        return part
    from torch.distributed.tensor import DTensor

    if part.device.type != like.device_mesh.device_type:  # from_local would move it there
        return DTensor(part, like._spec, requires_grad=False)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
