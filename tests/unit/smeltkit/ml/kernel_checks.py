"""Checks of the Triton kernels against the torch reference: `kernel_checks.py DEVICE`.

With TRITON_INTERPRET=1 they run on a CPU, where float64 lets gradients be checked numerically; on a GPU they run for
real, in half precision too. Every input is drawn at random and every output is compared whole.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from smeltkit.ml.decoder_linears import gated
from smeltkit.ml.decoder_packing import Packed, packed_attention
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.int8 import zeros
from smeltkit.ml.kernels import REFERENCE, triton_kernels
from smeltkit.ml.kernels.cross_entropy import linear_cross_entropy
from smeltkit.ml.kernels.reference import AdamStep
from smeltkit.ml.nf4 import quantize

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Error of ours by the norm of theirs, in float64; not finite never passes."""
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    return error if torch.isfinite(ours).all() else float("inf")


def compare(name: str, operation: Callable[..., Tensor], inputs: list[Tensor], *fixed: object) -> float:
    """Largest error of an operation's output and gradients against the reference in float64."""
    ours, exact = getattr(triton_kernels(), name), getattr(REFERENCE, name)
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    doubles = [value.detach().double().requires_grad_() for value in inputs]
    out, expected = ours(*map(operation, leaves), *fixed), exact(*map(operation, doubles), *fixed)
    above = torch.randn_like(out)
    out.backward(above)
    expected.backward(above.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, doubles, strict=True))]
    return max(relative(a, b) for a, b in pairs)  # type: ignore[arg-type]


def angles(tokens: int, half: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of random angles."""
    turn = torch.rand(tokens, half, device=device, dtype=torch.float64) * 6
    exact = torch.promote_types(dtype, torch.float32)
    return turn.cos().to(exact), turn.sin().to(exact)


def head(tokens: int, hidden: int, vocab: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight and targets of which some are ignored."""
    x, w = torch.randn(tokens, hidden, device=device, dtype=dtype), torch.randn(vocab, hidden, device=device).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    targets[torch.rand(tokens, device=device) < 0.2] = IGNORED
    return x, w / hidden**0.5, targets


def cross_entropy_error(
    tokens: int, hidden: int, vocab: int, device: str, dtype: torch.dtype, is_scaled: bool
) -> float:
    """Largest error of the fused loss and its gradients against plain cross-entropy in float64."""
    x, w, targets = head(tokens, hidden, vocab, device, dtype)
    leaves = [value.detach().clone().requires_grad_() for value in (x, w)]
    doubles = [value.detach().double().requires_grad_() for value in (x, w)]
    found = linear_cross_entropy(*leaves, targets, divisor=9, kernels=triton_kernels(), chunk_bytes=128 * vocab * 4)
    logits = doubles[0] @ doubles[1].T
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / 9
    (found / 7 if is_scaled else found).backward()
    (expected / 7 if is_scaled else expected).backward()
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(leaves, doubles, strict=True))]
    return max(relative(a, b) for a, b in pairs)  # type: ignore[arg-type]


def gated_error(gate_up: Tensor, hidden: int) -> float:
    """Largest error of the gated product of [T, 2 inner] and its gradients, whose input is not kept, in float64."""
    down = torch.nn.Linear(gate_up.shape[1] // 2, hidden, device=gate_up.device, dtype=gate_up.dtype)
    exact = copy.deepcopy(down).double()
    leaves = [gate_up.detach().clone().requires_grad_(), gate_up.detach().double().requires_grad_()]
    out = gated(*leaves[0].chunk(2, 1), down, triton_kernels())
    expected = exact(REFERENCE.swiglu(*leaves[1].chunk(2, 1)))
    above = torch.randn_like(out)
    out.backward(above)
    expected.backward(above.double())
    pairs = [(out, expected), (leaves[0].grad, leaves[1].grad), (down.weight.grad, exact.weight.grad)]
    return max(relative(a, b) for a, b in [*pairs, (down.bias.grad, exact.bias.grad)])  # type: ignore[arg-type]


def packing_error(lengths: tuple[int, ...], heads: int, kv_heads: int) -> float:
    """Largest error of bf16 attention and its gradients over packed samples, against each sample alone in float64."""
    batch = Packed.of([[0] * length for length in lengths], "cuda")
    leaves = [
        torch.randn(len(batch), n, 64, device="cuda").bfloat16().requires_grad_() for n in (heads, kv_heads, kv_heads)
    ]
    doubles = [value.detach().double().requires_grad_() for value in leaves]
    out = packed_attention(leaves[0], leaves[1], leaves[2], batch)
    parts = zip(*(value.split(lengths) for value in doubles), strict=True)
    alone = [packed_attention(q, k, v, Packed.of([[0] * len(q)], "cuda")) for q, k, v in parts]
    above = torch.randn_like(out)
    out.backward(above)
    torch.cat(alone).backward(above.double())
    pairs = [(out, torch.cat(alone)), *((a.grad, b.grad) for a, b in zip(leaves, doubles, strict=True))]
    return max(relative(a, b) for a, b in pairs)  # type: ignore[arg-type]


def check_all(device: str, dtypes: list[torch.dtype]) -> list[str]:
    """Every operation in every type, odd sizes and strided inputs included; what was found, one line each."""
    lines, is_real = [], device == "cuda"
    tokens = 1000 if is_real else 35
    sizes = [(96, 416, 6), (1536, 8960, 12)] if is_real else [(24, 30, 2)]
    for dtype in dtypes:
        errors: dict[str, float] = {}
        for hidden, inner, heads in sizes:
            x, w = torch.randn(tokens, hidden, device=device).to(dtype), torch.randn(hidden, device=device).to(dtype)
            errors[f"rms_norm {hidden}"] = compare("rms_norm", lambda v: v, [x, w], 1e-6)
            gate_up = torch.randn(2, tokens, 2 * inner, device=device).to(dtype)
            errors[f"swiglu {inner}"] = compare("swiglu", lambda v, n=inner: v[:, :n], [gate_up[0], gate_up[1]])
            for half in (8, 11) if is_real else (11,):
                cos, sin = angles(tokens, half, device, dtype)
                q = torch.randn(tokens, heads * 24 + 16, device=device).to(dtype)
                errors[f"rotate {half}"] = compare(
                    "rotate", lambda v, n=heads: v[:, : n * 24].unflatten(-1, (n, 24)), [q], cos, sin
                )
            errors[f"gated {inner}"] = gated_error(gate_up.flatten(0, 1), hidden)
            for is_scaled in (False, True):
                errors[f"cross_entropy {hidden} {is_scaled}"] = cross_entropy_error(
                    tokens if is_real else 130, hidden, 20001 if is_real else 45, device, dtype, is_scaled
                )
        for name, error in errors.items():
            lines.append(f"{'ok' if error < BOUNDS[dtype] else 'WRONG':6}{name:24}{str(dtype):16}{error:.2e}")
    return lines


def slope_error(call: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Relative difference of a scalar's slope along a random direction, by gradients and by central differences.

    For what has one backward pass only, which torch's own check repeats.
    """
    grads = torch.autograd.grad(call(*inputs), inputs)
    way = [torch.randn_like(value) for value in inputs]
    slope = sum((grad * step).sum() for grad, step in zip(grads, way, strict=True))
    with torch.no_grad():
        ahead, behind = (
            call(*[value + h * step for value, step in zip(inputs, way, strict=True)]) for h in (1e-6, -1e-6)
        )
    return abs(((ahead - behind) / 2e-6 - slope) / slope).item()


def gradcheck() -> list[str]:
    """torch's numeric check of every backward pass, in float64, along random directions."""
    kernels, device = triton_kernels(), "cpu"
    cos, sin = angles(3, 4, device, torch.float64)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    targets = torch.tensor([3, IGNORED, 0, 4])
    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-6), (leaf(3, 6), leaf(6))),
        "rotate": (lambda x: kernels.rotate(x, cos, sin), (leaf(3, 2, 10),)),
        "swiglu": (kernels.swiglu, (leaf(3, 5), leaf(3, 5))),
    }
    passed = {name: torch.autograd.gradcheck(call, inputs, fast_mode=True) for name, (call, inputs) in cases.items()}
    fused = slope_error(lambda x, w: linear_cross_entropy(x, w, targets, kernels=kernels), leaf(4, 3), leaf(5, 3))
    passed["cross_entropy"] = fused < 1e-7
    return [f"{'ok' if is_right else 'WRONG':6}gradcheck {name}" for name, is_right in passed.items()]


def dequantization(device: str) -> list[str]:
    """NF4 to floats, equal to the reference to the last bit, also where the last block is not full.

    The interpreter cuts bf16 off instead of rounding it, so there it is float32 alone.
    """
    lines, is_real = [], device == "cuda"
    for shape in [(7, 30), (96, 416), (300, 64), *([(3584, 18944)] if is_real else [])]:
        stored = quantize(torch.randn(shape, device=device) * 0.02)
        dtypes = [torch.float32, torch.bfloat16] if is_real else [torch.float32]
        both = [
            [kernels.dequantize_nf4(stored, dtype) for dtype in dtypes] for kernels in (triton_kernels(), REFERENCE)
        ]
        wide = torch.zeros(shape[0], shape[1] + 8, device=device)
        both[0].append(triton_kernels().dequantize_nf4(stored, torch.float32, wide[:, : shape[1]]))
        both[1].append(both[1][0])
        is_equal = all(map(torch.equal, *both)) and not wide[:, shape[1] :].any()
        lines.append(f"{'ok' if is_equal else 'WRONG':6}dequantize_nf4 {shape}")
    return lines


def rounding(device: str) -> list[str]:
    """The rounded update: each value one of the two next to the exact one, and the exact one on average."""
    size, draws = (1_000_003, 64) if device == "cuda" else (1_500, 16)
    weight, grad, mean = (torch.randn(size, device=device).bfloat16() for _ in range(3))
    square = (torch.rand(size, device=device) + 0.5).bfloat16()
    w, g, m, v = (value.double() for value in (weight, grad, mean, square))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    w = w * (1 - 1e-3 * 0.1) - 1e-3 * m / (1 - 0.9**2) / ((v / (1 - 0.999**2)).sqrt() + 1e-8)
    lines = []
    for kind, kernels in (("reference", REFERENCE), ("triton", triton_kernels())):
        found = [torch.zeros_like(exact) for exact in (w, m, v)]
        for seed in range(draws):
            drawn = [value.clone() for value in (weight, mean, square)]
            step = AdamStep(
                learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, count=2, seed=seed * 7919,
                grad_scale=0.25,
            )  # fmt: skip
            kernels.rounded_adamw(drawn[0], 4 * grad, drawn[1], drawn[2], step)
            for total, value in zip(found, drawn, strict=True):
                total += value.double() / draws
        # In steps of bf16: of a mean of draws, the worst may be a whole step off and all together hardly any.
        steps = [torch.exp2(exact.abs().clamp(min=1e-4).log2().floor() - 7) for exact in (w, m, v)]
        off = [(total - exact) / step for total, exact, step in zip(found, (w, m, v), steps, strict=True)]
        is_right = all(x.abs().max() < 1.01 and x.mean().abs() < 4 / (size * draws) ** 0.5 for x in off)
        lines.append(f"{'ok' if is_right else 'WRONG':6}rounded_adamw {kind} {[x.mean().item() for x in off]}")
    return lines


def coding(device: str) -> str:
    """Moments in 8 bits: the same weights, and codes that differ in few places and by one only."""
    size = 3_000_011 if device == "cuda" else 2_011
    weight, grad, first = (torch.randn(size, device=device) for _ in range(3))
    grad[: size // 3] *= 1e-4
    found = []
    for kernels in (REFERENCE, triton_kernels()):
        mean, square = (zeros(size, is_signed=is_signed, device=weight.device) for is_signed in (True, False))
        mean.write(first)
        square.write(first.square())
        held = weight.clone()
        for count in (2, 3):
            step = AdamStep(
                learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, count=count, seed=0,
                grad_scale=0.7,
            )  # fmt: skip
            kernels.int8_adamw(held, grad * count, mean, square, step)
        found.append((held, mean, square))
    (held, *coded), (other, *others) = found
    off = [(one.codes.int() - two.codes.int()).abs() for one, two in zip(coded, others, strict=True)]
    scales = max(relative(two.scales, one.scales) for one, two in zip(coded, others, strict=True))
    is_right = max(map(torch.max, off)) <= 1 and sum(each.float().mean() for each in off) < 1e-3 and scales < 1e-5
    is_right = is_right and relative(other, held) < 1e-5
    return f"{'ok' if is_right else 'WRONG':6}int8_adamw {relative(other, held):.2e} {scales:.2e}"


def main(device: str) -> int:
    """Prints the findings; 1 if any is wrong."""
    torch.manual_seed(torch.seed() % 2**31)
    is_real = device == "cuda"
    lines = check_all(device, [torch.float32, torch.bfloat16] if is_real else [torch.float64])
    lines += [*dequantization(device), *rounding(device), coding(device)]
    if is_real:
        packs = [((5, 300, 1, 77), 12, 2), ((128, 128), 12, 2), ((64, 3), 4, 4)]
        errors = [packing_error(*pack) for pack in packs]
        lines += [
            f"{'ok' if e < BOUNDS[torch.bfloat16] else 'WRONG':6}packing {p}  {e:.2e}"
            for p, e in zip(packs, errors, strict=True)
        ]
    else:
        lines += gradcheck()
    sys.stdout.write("\n".join([f"seed {torch.initial_seed()}", *lines, ""]))
    return int(any(line.startswith("WRONG") for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
