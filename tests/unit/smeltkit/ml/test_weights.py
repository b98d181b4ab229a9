"""Stored tensors against the declaration, and float types against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smeltkit.errors import TensorMismatch, UnsupportedQuantization
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.safetensors_io import SafetensorsFolder, write_safetensors
from smeltkit.ml.weights import from_float32, match_safetensors, read_slabs, to_float32
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

floats = st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1)


@given(floats)
def test_bf16_rounds_like_torch(values: list[float]) -> None:
    """Nearest, ties to even, subnormals included; and back exactly."""
    exact = np.asarray(values, dtype=np.float32)
    expected = torch.from_numpy(exact).bfloat16()
    bits = from_float32(exact, "BF16")
    assert np.array_equal(bits, expected.view(torch.uint16).numpy())
    assert np.array_equal(to_float32(bits, "BF16"), expected.float().numpy())


def matched(folder: Path, config: ModelConfig) -> None:
    """Opens and matches a folder."""
    match_safetensors(config, SafetensorsFolder.open(folder))


def rewrite(folder: Path, *, drop: str = "", add: dict[str, np.ndarray] | None = None) -> None:
    """Writes the folder's tensors again without one, or with others."""
    source = SafetensorsFolder.open(folder)
    tensors = [(name, info.dtype, source.read(name)) for name, info in source.tensors.items() if name != drop]
    tensors = [entry for entry in tensors if entry[0] not in (add or {})]
    write_safetensors(folder / "model.safetensors", [*tensors, *((k, "BF16", v) for k, v in (add or {}).items())])


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    """R-015: never newly initialised."""
    config = write_tiny_model(tmp_path, "qwen2")
    rewrite(tmp_path, drop="model.layers.1.self_attn.q_proj.bias")
    with pytest.raises(TensorMismatch, match=r"missing model\.layers\.1\.self_attn\.q_proj\.bias"):
        matched(tmp_path, config)


def test_extra_tensor_is_named(tmp_path: Path) -> None:
    """R-015: never unused."""
    config = write_tiny_model(tmp_path, "qwen2")
    rewrite(tmp_path, add={"model.extra.weight": np.zeros(3, np.uint16)})
    with pytest.raises(TensorMismatch, match=r"not declared model\.extra\.weight"):
        matched(tmp_path, config)


def test_flat_tensor_is_refused(tmp_path: Path) -> None:
    """R-024: the same values in one dimension are another tensor."""
    config = write_tiny_model(tmp_path, "llama")
    flat = np.zeros(96 * 416, np.uint16)
    rewrite(tmp_path, add={"model.layers.0.mlp.up_proj.weight": flat})
    with pytest.raises(TensorMismatch, match=r"shape \[39936\]"):
        matched(tmp_path, config)


def test_rotary_buffers_of_old_checkpoints_are_no_weights(tmp_path: Path) -> None:
    """They hold nothing that the config does not say."""
    config = write_tiny_model(tmp_path, "llama")
    rewrite(tmp_path, add={"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(12, np.uint16)})
    matched(tmp_path, config)


def test_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    """R-023: a stored head under declared tying is a copy or a contradiction."""
    config = write_tiny_model(tmp_path, "qwen3", tie_word_embeddings=True)
    embedding = SafetensorsFolder.open(tmp_path).read("model.embed_tokens.weight")
    rewrite(tmp_path, add={"lm_head.weight": embedding})
    matched(tmp_path, config)
    rewrite(tmp_path, add={"lm_head.weight": embedding + 1})
    with pytest.raises(TensorMismatch, match="tie_word_embeddings"):
        matched(tmp_path, config)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    """A quantized checkpoint in disguise."""
    config = ModelConfig.from_hf(tiny_config("llama"))
    write_tiny_model(tmp_path, "llama")
    source = SafetensorsFolder.open(tmp_path)
    tensors = [(name, "U8", source.read(name).astype(np.uint8)) for name in source.tensors]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(TensorMismatch, match="U8"):
        matched(tmp_path, config)


def test_value_beyond_f16_is_refused() -> None:
    """An overflow to infinity would be silent; BF16 is the remedy."""
    values = np.full((2, 2), 70_000, dtype=np.float32)
    with pytest.raises(UnsupportedQuantization, match="BF16"):
        list(read_slabs(values, "F32", "F16", "a"))


def test_value_that_is_not_finite_is_refused() -> None:
    """Damaged weights are found when they are read."""
    with pytest.raises(TensorMismatch, match="not finite"):
        list(read_slabs(np.asarray([[1.0, np.nan]], dtype=np.float32), "F32", "BF16", "a"))
