"""Learnt vectors that scale what frozen linear layers compute with: (IA)^3, Liu et al., arXiv:2205.05638.

Of keys and values the outputs are scaled, (W x + bias) * s, of the MLP's last layer the inputs, W (x * s) + bias. All
of s begin at one, so an adapter begins as no change at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.trainer.adapters.carriers import Carrier, Frozen


class Ia3Linear(Carrier):
    """A frozen linear layer and its vector [outputs], or [inputs] if it `scales_inputs`."""

    def __init__(self, base: Frozen, *, scales_inputs: bool) -> None:
        super().__init__(base)
        self.scales_inputs = scales_inputs
        size = base.in_features if scales_inputs else base.out_features
        self.scales = nn.Parameter(torch.ones(size, device=base.weight.device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs]. Scaled in float32: half precision holds few numbers near one."""
        taken = (x * self.scales).to(x.dtype) if self.scales_inputs else x
        out: Tensor = self.base(taken)
        return out if self.scales_inputs else (out * self.scales).to(x.dtype)

    @property
    def is_trained(self) -> bool:
        """Whether anything is scaled by another number than one."""
        return bool((self.scales != 1).any())

    def merged(self) -> Tensor:
        """See `Carrier`."""
        return self.base.weight.float() * (self.scales if self.scales_inputs else self.scales.unsqueeze(1))

    def merged_bias(self) -> Tensor:
        """See `Carrier`."""
        return self.base.bias if self.scales_inputs else self.base.bias.float() * self.scales
