"""AdamW whose moments are kept in 8 bits: 2 bytes a weight instead of 8, and 4 for each block of 256.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861): a block is divided by its largest
absolute value, and what is left is rounded to the nearest of 256 numbers that stand closer together near zero (dynamic
quantization, section 1.3 there). Every update is computed in float32 from moments that are exact for this step's
gradient. A mean of squares that is not zero never becomes zero by rounding, since it divides. Tensors of fewer than
SMALL values keep float32 moments, as do vectors, whose values are few and far apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from services.trainer.parameterwise import Parameterwise, State

BLOCK: Final = 256
SMALL: Final = 4096
_PART: Final = 1 << 24
"""Values that are updated at a time: what bounds the memory of an update."""
_DECADES: Final = 7
MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class Int8AdamW(Parameterwise):
    """For float32 parameters.

    State of a quantized parameter is `exp_avg` and `exp_avg_sq` as codes [values], and `.._scale` [blocks] of each.
    """

    @staticmethod
    def moments_of(parameter: Tensor) -> State:
        """The code of zero, or zeros in float32."""
        if not is_quantized(parameter):
            return {name: torch.zeros_like(parameter) for name in MOMENTS}
        state, count = {}, parameter.numel()
        for name in MOMENTS:
            zero = torch.searchsorted(_book(name, parameter.device.type), torch.zeros((), device=parameter.device))
            state[name] = torch.full((count,), int(zero), dtype=torch.uint8, device=parameter.device)
            state[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=parameter.device)
        return state

    @staticmethod
    def update(parameter: Tensor, grad: Tensor, state: State, count: int, group: dict[str, Any]) -> None:
        """Updates piece by piece."""
        for values, part, moments in _parts(parameter, grad, state):
            _update(values, part, moments, count, group)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter's moments are kept in 8 bits."""
    return parameter.dim() > 1 and parameter.numel() >= SMALL


def quantize(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Codes [n] and scales [ceil(n / BLOCK)] of the moment `name` with values [n]."""
    book, count = _book(name, values.device.type), values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2, out_int32=True)
    if name == "exp_avg_sq":
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.view(-1)[:count].to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """Values [n] of codes [n]."""
    spread = scales.repeat_interleave(BLOCK)[: codes.numel()]
    return _book(name, codes.device.type)[codes.int()] * spread


def _parts(parameter: Tensor, grad: Tensor, state: State) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Views of a parameter, its gradient and its moments, piece by piece; the whole where it is not quantized."""
    if not is_quantized(parameter):
        yield parameter, grad, {name: state[name] for name in MOMENTS}
        return
    values, flat = parameter.view(-1), grad.reshape(-1)
    for start in range(0, len(values), _PART):
        part, blocks = slice(start, start + _PART), slice(start // BLOCK, (start + _PART) // BLOCK)
        moments = {name: state[name][part] for name in MOMENTS}
        yield values[part], flat[part], moments | {f"{name}_scale": state[f"{name}_scale"][blocks] for name in MOMENTS}


def _update(values: Tensor, grad: Tensor, moments: State, count: int, group: dict[str, Any]) -> None:
    """One update in place, of moments too (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2)."""
    beta1, beta2 = group["betas"]
    has_codes = "exp_avg_scale" in moments
    mean, square = (
        dequantize(moments[name], moments[f"{name}_scale"], name) if has_codes else moments[name] for name in MOMENTS
    )
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    root = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    values.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**count))
    if has_codes:
        for name, exact in zip(MOMENTS, (mean, square), strict=True):
            codes, scales = quantize(exact, name)
            moments[name].copy_(codes)
            moments[f"{name}_scale"].copy_(scales)


@cache
def _book(name: str, device: str) -> Tensor:
    """The 256 numbers that codes of a moment stand for, ascending: within -1 to 1, or 0 to 1 for means of squares.

    Each decade down to 1e-6 has half as many as the one above it, in the middle of equal steps; then 0 and 1.
    """
    first = 1 if name == "exp_avg" else 2
    found = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, first * 2**decade + 1, dtype=torch.float64)
        means = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)).tolist()
        found += means + ([-mean for mean in means] if name == "exp_avg" else [])
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)
