"""The torch decoder equals transformers, and packing changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from smeltkit.errors import TensorMismatch
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.decoder_packing import Packed
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.decoder_weights import load_decoder, save_weights
from smeltkit.testing.tiny_models import write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("phi3", {}),
    ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 256}),
    ("phi3", {"partial_rotary_factor": 0.5}),
]
TOLERANCE = 1e-5


def _ids(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 380, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS, ids=lambda value: str(value)[:40])
def test_logits_loss_and_gradients_equal_transformers(
    tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    """R-054: fp32, 1e-5, every tensor of every architecture, with each kind of rope scaling."""
    config = write_tiny_model(tmp_path, architecture, dtype="F32", **overrides)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    ours = load_decoder(tmp_path, config)
    ids = _ids(70)
    expected = theirs(torch.tensor([ids]), labels=torch.tensor([ids]))
    batch, targets = Packed.of([ids]), torch.tensor([*ids[1:], IGNORED])
    assert _relative(ours(batch), expected.logits[0]) < TOLERANCE
    loss = ours.loss(batch, targets) / (len(ids) - 1)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE)
    loss.backward()
    expected.loss.backward()
    found = dict(theirs.named_parameters())
    assert len(list(ours.parameters())) == len(found)
    for name, parameter in ours.named_parameters():
        grad = found[names.canonical_to_hf(architecture, name)].grad
        assert parameter.grad is not None and grad is not None
        assert _relative(parameter.grad, grad) < 5 * TOLERANCE, name


@pytest.mark.parametrize("lengths", [(5, 33, 1, 17), (16, 16, 16)], ids=str)
def test_packed_samples_do_not_see_each_other(lengths: tuple[int, ...]) -> None:
    """R-061: logits of each sample in a pack equal those that it has alone."""
    torch.manual_seed(1)
    config = ModelConfig.from_hf(_raw("qwen3"))
    decoder = Decoder(config)
    samples = [_ids(length, seed) for seed, length in enumerate(lengths)]
    together = decoder(Packed.of(samples)).split(lengths)
    for sample, logits in zip(samples, together, strict=True):
        torch.testing.assert_close(logits, decoder(Packed.of([sample])), rtol=1e-5, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients() -> None:
    """Activation checkpointing trades time for memory and nothing else."""
    torch.manual_seed(2)
    decoder = Decoder(ModelConfig.from_hf(_raw("qwen2")))
    batch, targets, grads = Packed.of([_ids(20), _ids(9)]), torch.randint(0, 380, (29,)), []
    for decoder.recomputes in (False, True):
        decoder.zero_grad()
        decoder.loss(batch, targets).backward()
        grads.append([parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(list(decoder.parameters()))
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_saved_weights_are_the_loaded_ones(tmp_path: Path, dtype: str) -> None:
    """A bundle's weights survive the decoder bit for bit."""
    config = write_tiny_model(tmp_path, "phi3", dtype=dtype)
    before = (tmp_path / "model.safetensors").read_bytes()
    state = load_decoder(tmp_path, config).state_dict()
    save_weights(tmp_path, config, state, dtype)
    after = load_decoder(tmp_path, config).state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert len((tmp_path / "model.safetensors").read_bytes()) == len(before)


def test_weights_that_are_not_finite_are_neither_loaded_nor_saved(tmp_path: Path) -> None:
    """A NaN is found where it enters."""
    config = write_tiny_model(tmp_path, "qwen2", dtype="F32")
    state = load_decoder(tmp_path, config).state_dict()
    state["norm.weight"][3] = float("nan")
    with pytest.raises(TensorMismatch, match="norm.weight"):
        save_weights(tmp_path, config, state, "F32")


def _raw(architecture: str) -> dict[str, Any]:
    from smeltkit.testing.tiny_models import tiny_config

    return tiny_config(architecture)
