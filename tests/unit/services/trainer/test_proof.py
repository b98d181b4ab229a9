"""A node proves that its device computes what trainings need, or says what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer import proof
from services.trainer.config import ProofConfig
from services.trainer.proof import prove
from smeltkit.errors import BadConfig, DeviceUnfit
from smeltkit.ml.kernels import REFERENCE

CPU = ProofConfig(device="cpu")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is not what is tested here."""
    monkeypatch.setattr(proof, "_tflops", lambda device: 7.0)


def test_a_device_that_computes_right_passes_and_the_proof_is_kept(tmp_path: Path) -> None:
    """R-119: made once for a device, a driver and a release; another driver needs another proof."""
    config = replace(CPU, dir=str(tmp_path))
    first, again = prove(config), prove(config)
    assert first["is_repeated"] and not again["is_repeated"] and len(list(tmp_path.iterdir())) == 1
    assert 0 < first["gradient_error"] < 0.05 and first["driver"]


def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """R-119: an error in one kernel is more than bf16 explains."""

    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return REFERENCE.rotate(x, cos, -sin)

    with pytest.raises(DeviceUnfit, match=r"computes another \w+ than the reference.*take the node out"):
        prove(CPU, replace(REFERENCE, rotate=wrong))


def test_a_kernel_that_does_not_compile_is_named_with_the_driver() -> None:
    def broken(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise RuntimeError("PTX was compiled with an unsupported toolchain")

    with pytest.raises(DeviceUnfit, match="does not run on cpu.*driver.*unsupported toolchain"):
        prove(CPU, replace(REFERENCE, rms_norm=broken))


def test_values_that_are_not_finite_are_no_proof() -> None:
    def poisoned(gate: Tensor, up: Tensor) -> Tensor:
        return REFERENCE.swiglu(gate, up) * torch.tensor(float("nan"))

    with pytest.raises(DeviceUnfit):
        prove(CPU, replace(REFERENCE, swiglu=poisoned))


def test_a_slow_device_is_refused_also_by_a_kept_proof(tmp_path: Path) -> None:
    prove(replace(CPU, dir=str(tmp_path)))
    with pytest.raises(DeviceUnfit, match="reaches 7 TFLOP/s, this pool's floor is 500"):
        prove(replace(CPU, dir=str(tmp_path), floor_tflops=500))


def test_without_the_device_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The command ends with 1 and the reason; on a device that is fit with 0 and one line of JSON."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert proof.main() == 1
    assert "DEVICE_UNFIT" in caplog.text and "finds no CUDA device" in caplog.text
    monkeypatch.setenv("SMELT_PROOF_DEVICE", "cpu")
    assert proof.main() == 0
    line: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert line["tflops"] == 7.0


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"floor_tflops": -1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadConfig):
        ProofConfig(**settings)
