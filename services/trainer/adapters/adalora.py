"""Adapters whose ranks are shared out among the layers while they are trained: AdaLoRA, Zhang et al., arXiv:2303.10512.

W x + scale P L Q x with L diagonal, P [outputs, r] and Q [r, inputs] kept near orthogonal by a penalty. All layers
begin with as many ranks; which of all of them stay is decided by how much the loss hangs on each (|value x gradient|,
smoothed, times how uncertain that is), and the number that stays falls along a cubic until it is what was asked for. A
rank that goes has its L set to zero. Numbers and order are those of peft, whose step is counted as ours: from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.adapters.carriers import Carrier, Frozen, adapters
from services.trainer.settings.adalora import AdaloraSettings
from services.trainer.settings.training import LoraSettings
from smeltkit.ml.decoder import Decoder

_STD: Final = 0.02
_PARTS: Final = ("a", "b", "e")


class AdaloraLinear(Carrier):
    """A frozen linear layer and its adapter: Q as A [r, inputs], P as B [outputs, r], the diagonal of L as E [r, 1]."""

    def __init__(self, base: Frozen, config: LoraSettings) -> None:
        super().__init__(base)
        assert config.adalora is not None
        rank, device = config.adalora.initial_rank, base.weight.device
        self.scale, self.dropout = config.scale, config.dropout
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32).normal_(0, _STD))
        self.b = nn.Parameter(torch.empty(base.out_features, rank, device=device, dtype=torch.float32).normal_(0, _STD))
        self.e = nn.Parameter(torch.zeros(rank, 1, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs]."""
        kept = functional.dropout(x, self.dropout) if self.dropout > 0 and self.training else x
        inner = functional.linear(kept, (self.a * self.e).to(x.dtype))
        return torch.addmm(self.base(x), inner, self.b.to(x.dtype).T, alpha=self.scale)

    @property
    def is_trained(self) -> bool:
        """Whether any rank is left that does something."""
        return bool(self.e.any())

    @property
    def is_emptied(self) -> bool:
        """See `Carrier`."""
        return not self.is_trained

    def merged(self) -> Tensor:
        """See `Carrier`."""
        a, b = self.folded()
        return self.base.weight.float() + b @ a

    def folded(self) -> tuple[Tensor, Tensor]:
        """A [r, inputs] and B [outputs, r] of the ranks that are left, whose plain product is what the adapter adds."""
        left = self.e.detach().flatten() != 0
        return (self.a * self.e).detach()[left], self.scale * self.b.detach()[:, left]


class Allocation:
    """Shares out the ranks of all adapters on a decoder over the steps of a run."""

    def __init__(self, decoder: Decoder, config: AdaloraSettings, rank: int, total_steps: int) -> None:
        """`rank` is what a layer keeps on average, in a run of `total_steps`."""
        self._layers = dict(adapters(decoder, AdaloraLinear))
        self._config, self._total_steps = config, total_steps
        self._first, self._last = len(self._layers) * config.initial_rank, len(self._layers) * rank
        self._seen: dict[str, Tensor] = {}
        self._means = {name: torch.zeros_like(value) for name, value in self._values().items()}
        self._doubts = {name: torch.zeros_like(value) for name, value in self._values().items()}
        self._left = {name: torch.ones_like(layer.e) for name, layer in self._layers.items()}
        self._is_over = torch.zeros(1)

    def penalty(self) -> Tensor:
        """What is added to the loss of a step: by how much P^T P and Q Q^T differ from ones, on average."""
        squares = [q @ q.T for layer in self._layers.values() for q in (layer.a, layer.b.T)]
        norms = [torch.linalg.matrix_norm(one - torch.eye(len(one), device=one.device)) for one in squares]
        return self._config.orthogonality * torch.stack(norms).mean()

    def see(self, scale: float) -> None:
        """Keeps the gradients of a step, of which `scale` is used, for `share_out` after its update."""
        grads = {name: value.grad for name, value in self._values().items()}
        self._seen = {name: grad * scale for name, grad in grads.items() if grad is not None}

    @torch.no_grad()
    def share_out(self, step: int) -> None:
        """Takes ranks away after `step`, from 1, as its number and what was seen say."""
        seen, self._seen = self._seen, {}
        end = self._total_steps - self._config.final_steps
        if step < end:
            self._judge(seen)
            if step > self._config.warmup_steps and step % self._config.every_steps == 0:
                self._take_away(self.budget(step))
        elif not self._is_over:
            self._take_away(self._last)
            self._is_over.fill_(1)
        else:
            for name, layer in self._layers.items():
                layer.e.mul_(self._left[name])

    def budget(self, step: int) -> int:
        """Ranks that all layers have together after a step before the last phase."""
        first, end = self._config.warmup_steps, self._total_steps - self._config.final_steps
        share = 1 - max(step - first, 0) / (end - first)
        return int((self._first - self._last) * share**3 + self._last)

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to go on, by name."""
        return {
            "over": self._is_over,
            **{f"mean.{name}": value for name, value in self._means.items()},
            **{f"doubt.{name}": value for name, value in self._doubts.items()},
            **{f"left.{name}": value for name, value in self._left.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def _values(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{part}": getattr(layer, part) for name, layer in self._layers.items() for part in _PARTS}

    def _judge(self, seen: Mapping[str, Tensor]) -> None:
        """Takes in how much the loss hangs on each value (equations 8 to 11)."""
        beta1, beta2, values = self._config.beta1, self._config.beta2, self._values()
        for name, grad in seen.items():
            now = (values[name] * grad).abs()
            self._means[name].mul_(beta1).add_(now, alpha=1 - beta1)
            self._doubts[name].mul_(beta2).add_((now - self._means[name]).abs(), alpha=1 - beta2)

    def _take_away(self, budget: int) -> None:
        """Sets L to zero of all ranks but the `budget` most important ones; equal ones go together."""
        scores = {name: self._score(name) for name in self._layers}
        least = torch.cat(list(scores.values())).kthvalue(self._first - budget).values
        for name, layer in self._layers.items():
            self._left[name].copy_((scores[name] > least).unsqueeze(1))
            layer.e.mul_(self._left[name])

    def _score(self, name: str) -> Tensor:
        """Importance of each rank of a layer [r]: of its value in L, and of its vectors on average."""
        a, b, e = (self._means[f"{name}.{part}"] * self._doubts[f"{name}.{part}"] for part in _PARTS)
        return e.flatten() + a.mean(dim=1) + b.mean(dim=0)
