"""Proof that this node's device computes what trainings need, before the node takes any (R-119).

    python -m services.trainer.proof

One training step of a small decoder on the device in bf16, where every kernel is compiled and run, is held against the
same step on the CPU in float32 by reference kernels: the loss, and the gradient of each tensor. Then a large product
must reach the pool's floor. A pool's pods run it before their service starts. It prints what it found as one line of
JSON and ends with 0, or with 1 and DEVICE_UNFIT, what is wrong and what to do. A proof that was passed is kept and not
repeated as long as device, driver, versions and code are the same.

It does not show that the device stays well, nor that several of them work together.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from services.trainer.config import ProofConfig
from services.trainer.run.device import device_name, matrix_flops, prepare_device
from smeltkit.config import from_environment
from smeltkit.errors import BadConfig, DeviceUnfit
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.kernels import REFERENCE, Kernels, kernels_for
from smeltkit.revision import code_revision

_VOCABULARY: Final = 2048
_SMALL: Final = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
_LENGTHS: Final = (61, 128, 7)
_LOSS_MAX, _GRADIENT_MAX = 0.02, 0.05
"""Relative errors that bf16 explains: of the loss, and of a tensor's gradient by its norm."""
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_log = logging.getLogger(__name__)


def prove(config: ProofConfig, kernels: Kernels | None = None) -> dict[str, Any]:
    """What was found, made now or kept from before; DeviceUnfit. `kernels` are the device's own unless given."""
    found = prepare_device(0)
    if config.device == "cuda" and found != "cuda":
        raise DeviceUnfit(
            f"torch {torch.__version__} finds no CUDA device (driver: {_driver()}); the node's driver must be one that "
            f"CUDA {torch.version.cuda or 'of a CUDA build of torch'} runs on, and the pod must be given a GPU"
        )
    facts = _facts(config.device)
    kept = Path(config.dir) / f"{digest_bytes(canonical_json(facts)).removeprefix('sha256:')}.json"
    if config.dir and kept.is_file():
        return _checked({**json.loads(kept.read_bytes()), "is_repeated": False}, config)
    proof = {**facts, **_parity(config.device, kernels), "tflops": _tflops(config.device), "is_repeated": True}
    _checked(proof, config)
    if config.dir:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(proof))
    return proof


def main() -> int:
    """The exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        proof = prove(from_environment(ProofConfig, "SMELT_PROOF_"))
    except (DeviceUnfit, BadConfig) as error:
        _log.error("%s: %s", error.reason(), error.message)
        return 1
    sys.stdout.write(json.dumps(proof) + "\n")
    return 0


def _parity(device: str, kernels: Kernels | None) -> dict[str, Any]:
    """Largest relative errors of a step on the device; DeviceUnfit if a kernel cannot run there at all."""
    exact_loss, exact = _step("cpu", torch.float32, REFERENCE)
    try:
        loss, gradients = _step(device, torch.bfloat16, kernels or kernels_for(device))
    except Exception as error:
        raise DeviceUnfit(
            f"a training step does not run on {device_name(device)} (driver: {_driver()}): {type(error).__name__}: "
            f"{str(error)[:300]}; the driver must be one that this image's CUDA and Triton support"
        ) from error
    errors = {name: _relative(gradients[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name])
    return {"loss_error": abs(loss / exact_loss - 1), "gradient_error": errors[worst], "gradient_of": worst}


def _step(device: str, dtype: torch.dtype, kernels: Kernels) -> tuple[float, Mapping[str, Tensor]]:
    """Loss a token and the gradients, on the host in float32, of the same step wherever it runs."""
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_hf(_SMALL), kernels=kernels).bfloat16().to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(0, _VOCABULARY, (length,), generator=generator).tolist() for length in _LENGTHS]
    batch = Packed.of(samples, device)
    loss = decoder.loss(batch, batch.ids.roll(-1)) / len(batch)
    loss.backward()
    gradients = {name: value.grad.float().cpu() for name, value in decoder.named_parameters() if value.grad is not None}
    return loss.item(), gradients


def _checked(proof: dict[str, Any], config: ProofConfig) -> dict[str, Any]:
    """The proof; DeviceUnfit if it is none."""
    for name, most in (("loss_error", _LOSS_MAX), ("gradient_error", _GRADIENT_MAX)):
        if not proof[name] <= most:
            raise DeviceUnfit(
                f"{proof['device']} (driver: {proof['driver']}) computes another {name.partition('_')[0]} than the "
                f"reference: relative error {proof[name]:.2g}, at most {most:g} ({proof['gradient_of']}); "
                "change the driver or take the node out of the pool"
            )
    if proof["tflops"] < config.floor_tflops:
        raise DeviceUnfit(
            f"{proof['device']} reaches {proof['tflops']:.0f} TFLOP/s, this pool's floor is {config.floor_tflops:g}; "
            "see who else uses it, its clocks and its temperature, or lower SMELT_PROOF_FLOOR_TFLOPS"
        )
    return proof


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Error of ours by the norm of theirs; infinite if ours is not finite."""
    if not torch.isfinite(ours).all():
        return float("inf")
    error: float = ((ours - theirs).norm() / theirs.norm()).item()
    return error


def _tflops(device: str) -> float:
    return matrix_flops(device, torch.bfloat16) / 1e12


def _facts(device: str) -> dict[str, Any]:
    """All that a proof holds for."""
    return {
        "device": device_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "code": code_revision(),
    }


def _driver() -> str:
    """Version of the driver; `none` where there is none."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _DRIVER.read_text() if _DRIVER.is_file() else "")
    return found[0] if found else "none"


if __name__ == "__main__":
    sys.exit(main())
