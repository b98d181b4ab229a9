"""The operations in plain torch: what every kernel is held against, and what runs on a CPU.

Formulas: RMSNorm, Zhang and Sennrich (arXiv:1910.07467); RoPE by halves, Su et al. (arXiv:2104.09864) in the layout of
GPT-NeoX; SwiGLU, Shazeer (arXiv:2002.05202).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.int8 import Coded
from smeltkit.ml.nf4 import Nf4, tables
from smeltkit.ml.nf4_layout import LEVELS, SCALE_BLOCK

_PART = 1 << 24
"""Values with moments in 8 bits that are updated at a time."""


@dataclass(frozen=True, kw_only=True)
class AdamStep:
    """One update of AdamW."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    count: int
    """Number of the update, from 1."""
    seed: int
    """Of the random bits, below 2^31, where any are needed."""
    grad_scale: float = 1.0
    """What the gradient is multiplied by first: less than 1 where it is clipped."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] over its root mean square, times weight [H]; rounded to the type of x before the product."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] with dimensions i and i + R / 2 of its first R rotated; cos and sin are [T, R / 2]."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return functional.silu(gate) * up


def swiglu_gradient_(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and up, of rows [N, I]; swiglu(gate, up) itself takes the place of `upstream`."""
    exact, above = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, upstream))
    sigmoid = exact.sigmoid()
    by_gate = above * up * sigmoid * (1 + exact * (1 - sigmoid))
    by_up = above * exact * sigmoid
    upstream.copy_(swiglu(gate, up))
    return by_gate.to(gate.dtype), by_up.to(up.dtype)


def softmax_gradient_(logits: Tensor, targets: Tensor, divisor: int = 1) -> Tensor:
    """Cross-entropy of logits [C, V] by targets [C], as losses [C] in float32 at least, 0 where ignored.

    In place of the logits stands, afterwards, what they contribute to the gradient of the summed loss over `divisor`:
    softmax - onehot(target), 0 where ignored, over `divisor`.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_counted = (targets != IGNORED).unsqueeze(1)
    chosen = targets.clamp(min=0).unsqueeze(1)
    log_sum = torch.logsumexp(exact, dim=1, keepdim=True)
    losses = (log_sum - exact.gather(1, chosen)) * is_counted
    gradient = torch.exp(exact - log_sum).scatter_add_(1, chosen, torch.full_like(log_sum, -1.0)) * is_counted
    logits.copy_(gradient / divisor)
    return losses.squeeze(1)


def rescale_(values: Tensor, factor: Tensor) -> None:
    """Values times a scalar, in place, in float32 at least."""
    if factor != 1:
        values.copy_(values.to(torch.promote_types(values.dtype, torch.float32)) * factor)


def dequantize_nf4(weight: Nf4, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The tensor that `weight` stores: level by scale in float32, rounded to `dtype`; written to `out` if given.

    `out` has that shape and type, and any strides: it may be a part of a larger matrix.
    """
    levels, scale_levels = tables(weight.codes.device).split((len(LEVELS), 256))
    largest = weight.scale_maxima.repeat_interleave(SCALE_BLOCK)[: len(weight.codes)]
    scales = scale_levels[weight.scale_codes.int()] * largest + weight.scale_mean
    halves = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).flatten(1).int()
    values: Tensor = (levels[halves] * scales[:, None]).flatten()[: weight.size]
    found = values.view(weight.shape).to(dtype)
    return found if out is None else out.copy_(found)


def adamw_(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> None:
    """AdamW on float32 tensors, in place (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2)."""
    grad = grad * step.grad_scale
    mean.lerp_(grad, 1 - step.beta1)
    square.mul_(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    weight.mul_(1 - step.learning_rate * step.weight_decay)
    root = (square / (1 - step.beta2**step.count)).sqrt_().add_(step.eps)
    weight.addcdiv_(mean, root, value=-step.learning_rate / (1 - step.beta1**step.count))


def int8_adamw_(weight: Tensor, grad: Tensor, mean: Coded, square: Coded, step: AdamStep) -> None:
    """AdamW on weights [n] in float32 and moments in 8 bits, in place and piece by piece, so in bounded memory."""
    for begin in range(0, len(weight), _PART):
        end = min(begin + _PART, len(weight))
        coded = [moment.part(begin, end) for moment in (mean, square)]
        exact = [moment.values() for moment in coded]
        adamw_(weight[begin:end], grad[begin:end], exact[0], exact[1], step)
        for moment, values in zip(coded, exact, strict=True):
            moment.write(values)


def rounded_adamw_(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> None:
    """AdamW in float32 on bf16 tensors, in place; what comes out is rounded stochastically, right on average."""
    exact = grad.float() * step.grad_scale
    m = step.beta1 * mean.float() + (1 - step.beta1) * exact
    v = step.beta2 * square.float() + (1 - step.beta2) * exact.square()
    root = v.sqrt() / (1 - step.beta2**step.count) ** 0.5 + step.eps
    rate = step.learning_rate / (1 - step.beta1**step.count)
    w = weight.float() * (1 - step.learning_rate * step.weight_decay) - rate * m / root
    generator = torch.Generator(weight.device).manual_seed(step.seed)
    for target, value in ((weight, w), (mean, m), (square, v)):
        bits = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
        # Added to the bits that are cut off: a carry into the others is as likely as they are large.
        target.copy_(((value.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32))
