"""Triton kernels in Triton's interpreter, and the fused cross-entropy on its torch reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.int8 import BLOCK
from smeltkit.ml.kernels.cross_entropy import linear_cross_entropy, token_losses

ROOT = Path(__file__).parents[4]


def test_triton_kernels_equal_the_reference_and_their_gradients_are_right() -> None:
    """R-054: every kernel's output and hand-written backward pass, in float64, in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("kernel_checks.py")), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernels_equal_the_reference_on_a_gpu() -> None:
    """R-054: the same in float32 and bf16, compiled, with launches that wait and launches that do not."""
    for blocking in ("0", "1"):
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": blocking, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(__file__).with_name("kernel_checks.py")), "cuda"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernel_of_8_bit_moments_is_built_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-054: what the interpreter takes the compiler may refuse; no GPU is needed to build for one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from smeltkit.ml.kernels import triton_int8_adamw

    kernel = triton_int8_adamw._update
    fixed = {"ROWS": 4, "BLOCK": BLOCK}
    types = {"mean": "*u8", "square": "*u8", "size": "i32", "blocks": "i32", **dict.fromkeys(fixed, "constexpr")}
    floats = ("beta1", "beta2", "eps", "decay", "rate", "root_scale", "grad_scale")
    signature = {name: types.get(name, "fp32" if name in floats else "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in fixed.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_fused_cross_entropy_equals_the_plain_one() -> None:
    """R-054: loss and both gradients, in chunks that do not divide the tokens; no second backward pass."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (300, 11))
    targets = torch.randint(0, 11, (300,))
    targets[::7] = IGNORED
    ours = linear_cross_entropy(hidden, weight, targets, divisor=3, chunk_bytes=1)
    theirs = functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum") / 3
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight), retain_graph=True),
        torch.autograd.grad(theirs, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    with pytest.raises(AssertionError, match="second backward"):
        ours.backward()
    torch.testing.assert_close(token_losses(hidden, weight, targets).sum() / 3, theirs.detach())
