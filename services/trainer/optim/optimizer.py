"""AdamW over the trainable parameters, with float32 master weights wherever a parameter is stored in less.

An update of a bf16 weight is mostly smaller than the weight's own rounding, so it is made on a float32 copy that is
rounded afterwards, or, with `state: bfloat16`, on the weight itself, rounded stochastically. With `state: int8` the
moments are in 8 bits. With `offload` float32 copies and moments lie in the memory of the host and are updated there.
Of parameters that are spread over processes each updates the part it holds. What the optimizer really uses can be read
back and is compared with the config at every start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.trainer.optim.int8_adamw import MOMENTS, Int8AdamW, is_quantized
from services.trainer.optim.parameterwise import Parameterwise
from services.trainer.optim.rounded_adamw import RoundedAdamW
from services.trainer.parallel.ranks import Ranks
from services.trainer.parallel.sharding import held, is_told
from services.trainer.settings.training import AdamSettings
from smeltkit.errors import SettingsDiffer

_KINDS: Final = {"bfloat16": RoundedAdamW, "int8": Int8AdamW}
"""State that is not AdamW's own, and what keeps it so."""


class Optimizer:
    """Updates parameters from their gradients. The learning rate comes with every step: nothing else sets it."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: AdamSettings) -> None:
        """Takes over the parameters that require a gradient, by name; SettingsDiffer if AdamW does not obey."""
        named = [(name, value) for name, value in parameters if value.requires_grad]
        self.names = [name for name, _ in named]
        self._config = config
        self._parameters = [value for _, value in named]
        self._held = [held(value) for value in self._parameters]
        is_rounded = config.state == "bfloat16"
        self._masters = [_master(value, config) for value in self._held]
        is_far = config.offload and self._held[0].is_cuda
        self._stages = [torch.empty_like(value, device="cpu", pin_memory=True) for value in self._held if is_far]
        """Memory that a GPU copies from and to by itself, as large as the parameters."""
        decays = [value.dim() > 1 for value in self._masters]
        shared: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
        groups = [
            {"params": [m for m, is_decayed in zip(self._masters, decays, strict=True) if is_decayed == wanted],
             "weight_decay": config.weight_decay if wanted else 0.0}
            for wanted in (True, False)
        ]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        self._inner: torch.optim.Optimizer
        if is_rounded:
            self._inner = RoundedAdamW(groups, **shared)
        elif config.state == "int8":
            self._inner = Int8AdamW(groups, **shared)
        else:
            self._inner = torch.optim.AdamW(groups, fused=self._masters[0].is_cuda or config.offload, **shared)
        self._check()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of `names`."""
        return self._parameters

    @property
    def grads(self) -> list[Tensor]:
        """What this process holds of the gradients that there are."""
        return [held(parameter.grad) for parameter in self._parameters if parameter.grad is not None]

    def told_grads(self, ranks: Ranks) -> list[Tensor]:
        """Those of `grads` that this process counts, so that over all processes each value counts once."""
        return [held(p.grad) for p in self._parameters if p.grad is not None and is_told(p, ranks)]

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float = 1.0) -> None:
        """Updates every parameter from its gradient times `scale` and drops the gradients."""
        is_scaling = isinstance(self._inner, Parameterwise)
        if scale != 1.0 and not is_scaling:
            torch._foreach_mul_(self.grads, scale)
        self._take_gradients()
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
            if is_scaling:
                group["scale"] = scale
        self._inner.step()
        self._give_weights()
        self._inner.zero_grad(set_to_none=True)

    def in_use(self) -> dict[str, Any]:
        """Hyper-parameters as AdamW holds them now, of the group that decays."""
        group = self._inner.param_groups[0]
        return {
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "state": next((name for name, kind in _KINDS.items() if isinstance(self._inner, kind)), "float32"),
            "offload": self._config.offload,
            "learning_rate": group["lr"],
        }

    def state(self) -> dict[str, Tensor]:
        """Everything that a later run needs to go on, by name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, ...

        Of what is spread over processes, this one's part.
        """
        found: dict[str, Tensor] = {}
        for name, master, part in zip(self.names, self._masters, self._held, strict=True):
            found |= {f"{name}.{key}": value for key, value in self._inner.state[master].items()}
            if master is not part:
                found[f"{name}.master"] = master
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` gave; SettingsDiffer if it is that of other parameters."""
        taken: set[str] = set()
        is_fused = self._inner.defaults.get("fused", False)  # then torch counts steps on the device, else on the CPU
        for name, master, part in zip(self.names, self._masters, self._held, strict=True):
            mine = {
                key.removeprefix(f"{name}."): value for key, value in state.items() if key.rpartition(".")[0] == name
            }
            taken |= {f"{name}.{key}" for key in mine}
            stored = mine.pop("master", None)
            if (stored is None) != (master is part) or mine.keys() != self._keys(master):
                raise SettingsDiffer(f"the checkpoint's optimizer state does not fit {name}; it holds {sorted(mine)}")
            if stored is not None:
                master.copy_(stored)
            self._inner.state[master] = {
                key: value.to("cpu" if key == "step" and not is_fused else master.device, copy=True)
                for key, value in mine.items()
            }
        if taken != state.keys():
            raise SettingsDiffer(f"the checkpoint holds optimizer state of {sorted(state.keys() - taken)[0]}")

    def _take_gradients(self) -> None:
        """Moves gradients to the copies that are updated, where those are not the parameters themselves."""
        if self._stages:
            # In the parameter's own type and without a wait for each, many times as fast as a copy that converts.
            for stage, grad in zip(self._stages, self.grads, strict=True):
                stage.copy_(grad, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        for number, (master, parameter) in enumerate(zip(self._masters, self._parameters, strict=True)):
            if master is not parameter:
                assert parameter.grad is not None
                found = self._stages[number] if self._stages else held(parameter.grad)
                master.grad, parameter.grad = found.to(master), None

    def _give_weights(self) -> None:
        """Rounds the copies into the parameters."""
        if self._stages:
            for stage, master, part in zip(self._stages, self._masters, self._held, strict=True):
                part.copy_(stage.copy_(master), non_blocking=True)
        elif pairs := [(h, m) for h, m in zip(self._held, self._masters, strict=True) if h is not m]:
            torch._foreach_copy_([h for h, _ in pairs], [m for _, m in pairs])

    def _keys(self, master: Tensor) -> set[str]:
        """What the state of a parameter consists of."""
        has_scales = isinstance(self._inner, Int8AdamW) and is_quantized(master)
        return {"step", *MOMENTS, *(f"{name}_scale" for name in MOMENTS if has_scales)}

    def _check(self) -> None:
        wanted = {**asdict(self._config), "learning_rate": 0.0}
        found = self.in_use()
        if any(value.dim() > 1 for value in self._masters) and found != wanted:
            raise SettingsDiffer(f"the optimizer uses {found}, but the config says {wanted}")


def _master(value: Tensor, config: AdamSettings) -> Tensor:
    """What is updated: the parameter itself, or a float32 copy, in the memory of the host if it is offloaded."""
    if config.offload:
        return value.detach().to(device="cpu", dtype=torch.float32, copy=True)
    return value if config.state == "bfloat16" or value.dtype == torch.float32 else value.detach().to(torch.float32)
