"""NF4 with quantized scales: the published levels, a written-out reference, bounds of the error."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from smeltkit.ml.kernels import REFERENCE
from smeltkit.ml.nf4 import Nf4, quantize, tables
from smeltkit.ml.nf4_layout import BLOCK, LEVELS, SCALE_BLOCK, stored_bytes

SHAPES = [(96, 128), (7, 30), (300, 64)]


def _scales(stored: Nf4) -> list[float]:
    """Scales of all blocks, one after the other."""
    levels = tables(torch.device("cpu"))[len(LEVELS) :].tolist()
    mean = stored.scale_mean.item()
    maxima = stored.scale_maxima.tolist()
    return [levels[code] * maxima[n // SCALE_BLOCK] + mean for n, code in enumerate(stored.scale_codes.tolist())]


def test_levels_are_the_published_quantiles() -> None:
    """arXiv:2305.14314: eight quantiles of a normal below zero and nine from it on, to 0.9677, over the largest."""
    edge, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(edge + (0.5 - edge) * n / 8) for n in range(8)]
    below = [-quantile(edge + (0.5 - edge) * n / 7) for n in range(7)]
    expected = sorted([*above, 0.0, *below])
    assert [value / expected[-1] for value in expected] == pytest.approx(LEVELS, abs=2e-6)
    scale_levels = tables(torch.device("cpu"))[len(LEVELS) :]
    assert len(set(scale_levels.tolist())) == 256 and (scale_levels.diff() > 0).all()
    assert scale_levels.max() == 1 and scale_levels.min() > -1 and scale_levels.abs().min() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_values_are_those_written_out(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Value by value in plain Python: the nearest level, times the scale as it is stored; half-filled blocks too."""
    torch.manual_seed(1)
    values = (torch.randn(shape) * 0.02).to(dtype)
    stored = quantize(values)
    flat, scales = values.flatten().tolist(), _scales(stored)
    assert sum(part.nbytes for part in (stored.codes, stored.scale_codes, stored.scale_maxima, stored.scale_mean)) == (
        stored_bytes(len(flat))
    )
    expected = []
    for begin in range(0, len(flat), BLOCK):
        block = flat[begin : begin + BLOCK]
        largest = max(map(abs, block))
        nearest = [min(LEVELS, key=lambda level, v=value: abs(level - v / largest)) for value in block]
        expected += [level * scales[begin // BLOCK] for level in nearest]
    found = REFERENCE.dequantize_nf4(stored, torch.float32)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    rounded = REFERENCE.dequantize_nf4(stored, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, found.bfloat16())


def test_quantizing_the_scales_costs_no_more_than_their_step() -> None:
    """Each scale is off by at most half the widest gap of its levels, times the largest of its 256."""
    torch.manual_seed(2)
    values = torch.randn(256, 512) * torch.rand(256, 1)
    stored = quantize(values)
    exact = values.view(-1, BLOCK).abs().amax(1)
    widest = tables(torch.device("cpu"))[len(LEVELS) :].diff().max().item()
    bound = stored.scale_maxima.repeat_interleave(SCALE_BLOCK)[: len(exact)] * widest / 2
    error = (torch.tensor(_scales(stored)) - exact).abs()
    assert (error <= bound * 1.001 + 1e-7).all() and error.any()
    noise = (REFERENCE.dequantize_nf4(stored, torch.float32) - values).norm() / values.norm()
    assert 0.05 < noise < 0.11


def test_edges_survive() -> None:
    """Zeros stay zeros, a constant stays itself, and what came out once comes out again."""
    zeros = quantize(torch.zeros(3, 100))
    assert not REFERENCE.dequantize_nf4(zeros, torch.float32).any()
    constant = REFERENCE.dequantize_nf4(quantize(torch.full((2, 64), 0.25)), torch.float32)
    torch.testing.assert_close(constant, torch.full((2, 64), 0.25))
    torch.manual_seed(3)
    once = quantize(torch.randn(32, 64))
    again = quantize(REFERENCE.dequantize_nf4(once, torch.float32))
    assert torch.equal(once.codes, again.codes)
    assert math.prod(once.shape) == once.size == 2048
