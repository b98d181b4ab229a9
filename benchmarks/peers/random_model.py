"""GGUF files of a real model's shape with random weights, for speed alone: they cannot be asked anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig, TensorSpec
from smeltkit.ml.gguf_config import metadata_of
from smeltkit.ml.gguf_convert import stored_type
from smeltkit.ml.gguf_io import GgufTensor, write_gguf

QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
POOL = 1 << 24
STANDARD_DEVIATION = 0.02


def write_random_models(folder: Path, schemes: Iterable[str], shape: Mapping[str, Any] = QWEN_1_5B) -> dict[str, Path]:
    """A file a scheme in `folder`, all of the same random weights of `shape`, the fields of a model's config.json."""
    config = ModelConfig.from_hf(shape)
    f16 = folder / "F16.gguf"
    metadata = {**metadata_of(config), "general.file_type": 1, "tokenizer.ggml.model": "none"}
    write_gguf(f16, {**metadata, "qwen2.vocab_size": config.vocab_size}, _tensors(config))
    paths = {scheme: folder / f"{scheme}.gguf" for scheme in schemes}
    for scheme, path in paths.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[scheme]
        assert llama_cpp.llama_model_quantize(str(f16).encode(), str(path).encode(), params) == 0
    f16.unlink()
    return paths


def _tensors(config: ModelConfig) -> list[GgufTensor]:
    pool = (np.random.default_rng(0).standard_normal(POOL, np.float32) * STANDARD_DEVIATION).astype(np.float16)
    return [
        GgufTensor(
            name=names.canonical_to_gguf(config.architecture, spec.name),
            dtype=stored_type(spec, "F16"),
            shape=spec.shape,
            blocks=partial(_blocks, pool, index, spec),
        )
        for index, spec in enumerate(config.tensors())
    ]


def _blocks(pool: NDArray[np.float16], index: int, spec: TensorSpec) -> Iterable[NDArray[Any]]:
    """The tensor's values: ones for norms, else stretches of the pool, shifted so that no two tensors are equal."""
    if len(spec.shape) == 1:
        yield np.full(spec.elements, 1.0 if spec.name.endswith("norm.weight") else 0.0, np.float32)
        return
    left, start = spec.elements, (index * 7919) % POOL
    while left:
        block = pool[start : start + left]
        yield block
        left, start = left - len(block), 0
