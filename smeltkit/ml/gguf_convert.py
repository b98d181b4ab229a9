"""A Hugging Face folder as one GGUF file, in our own code, and nothing half-written.

Weights stream tensor by tensor, so memory is bound by the largest one. Matrices get the requested float type, vectors
stay float32 as llama.cpp requires. For llama, q and k rows are reordered: llama.cpp rotates neighbouring pairs there
("NORM" rope) where Hugging Face rotates halves; qwen2, qwen3 and phi3 need nothing ("NEOX" rope).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from smeltkit.errors import BadModelConfig, UnsupportedQuantization
from smeltkit.ml import names, weights
from smeltkit.ml.arch import ModelConfig, TensorSpec
from smeltkit.ml.gguf_config import metadata_of
from smeltkit.ml.gguf_io import GgufTensor, write_gguf
from smeltkit.ml.gguf_vocab import vocabulary_metadata
from smeltkit.ml.model_files import read_json
from smeltkit.ml.rope import llama3_frequency_factors
from smeltkit.ml.safetensors_io import SafetensorsFolder, TensorInfo

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
"""Float types a conversion can make, to llama.cpp's number for such a file."""

Progress = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion wrote: GGUF tensor name to stored type, and the file's size in bytes."""

    tensors: dict[str, str]
    size_bytes: int


def convert_to_gguf(folder: Path, out: Path, *, dtype: str = "BF16", progress: Progress | None = None) -> ConvertReport:
    """Writes the model in `folder` to `out`, with tokenizer, chat template and stop ids embedded.

    Errors name the file at fault: BadModelConfig, TensorMismatch, BadTokenizer (ids would differ), or
    UnsupportedArchitecture for a model that llama.cpp would run wrongly. `out` appears whole or not at all.
    """
    if dtype not in FILE_TYPES:
        raise UnsupportedQuantization(f"conversion makes {', '.join(FILE_TYPES)}, not {dtype!r}; quantize afterwards")
    config = read_config(folder)
    source = SafetensorsFolder.open(folder)
    architecture = metadata_of(config)
    vocabulary = vocabulary_metadata(folder, architecture, config.vocab_size)
    file_type = {"general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2}
    tensors = _tensors(config, source, dtype)
    if progress:
        tensors = [_counted(tensor, index, len(tensors), progress) for index, tensor in enumerate(tensors, 1)]
    partial_path = out.with_name(out.name + ".partial")
    try:
        size_bytes = write_gguf(partial_path, {**architecture, **file_type, **vocabulary}, tensors)
        os.replace(partial_path, out)
    finally:
        partial_path.unlink(missing_ok=True)
    return ConvertReport(tensors={tensor.name: tensor.dtype for tensor in tensors}, size_bytes=size_bytes)


def read_config(folder: Path) -> ModelConfig:
    """The dimensions in a folder's config.json; BadModelConfig if it is missing."""
    if not (folder / "config.json").exists():
        raise BadModelConfig("config.json is missing; a model folder needs it")
    return ModelConfig.from_hf(read_json(folder / "config.json"))


def stored_type(spec: TensorSpec, dtype: str) -> str:
    """The type that a conversion to `dtype` stores a tensor in."""
    return dtype if len(spec.shape) > 1 else "F32"


def permute_rotary(values: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a q or k projection, (heads * head_dim, ...), from rotated halves to rotated neighbours."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _tensors(config: ModelConfig, source: SafetensorsFolder, dtype: str) -> list[GgufTensor]:
    infos = weights.match_safetensors(config, source)
    found = [
        GgufTensor(
            name=names.canonical_to_gguf(config.architecture, spec.name),
            dtype=stored_type(spec, dtype),
            shape=spec.shape,
            blocks=partial(_blocks, config, source, infos[spec.name], spec, stored_type(spec, dtype)),
        )
        for spec in config.tensors()
    ]
    return found + [
        GgufTensor(name=name, dtype="F32", shape=values.shape, blocks=partial(list, [values]))
        for name, values in _rope_tensors(config)
    ]


def _blocks(
    config: ModelConfig, source: SafetensorsFolder, info: TensorInfo, spec: TensorSpec, dtype: str
) -> Iterable[npt.NDArray[Any]]:
    values = source.read(info.name)
    part = spec.name.rsplit(".", 2)[-2]
    if config.traits.is_rope_interleaved_in_gguf and part in ("q", "k"):
        values = permute_rotary(values, config.heads if part == "q" else config.kv_heads)
    return weights.read_slabs(values, info.dtype, dtype, info.name)


def _rope_tensors(config: ModelConfig) -> list[tuple[str, npt.NDArray[np.float32]]]:
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        factors = llama3_frequency_factors(scaling, config.rope_theta, config.rotary_dim)
        return [("rope_freqs.weight", np.asarray(factors, dtype=np.float32))]
    if scaling.get("rope_type") == "longrope":
        return [
            ("rope_factors_long.weight", np.asarray(scaling["long_factor"], dtype=np.float32)),
            ("rope_factors_short.weight", np.asarray(scaling["short_factor"], dtype=np.float32)),
        ]
    return []


def _counted(tensor: GgufTensor, index: int, total: int, progress: Progress) -> GgufTensor:
    def blocks() -> Iterable[npt.NDArray[Any]]:
        yield from tensor.blocks()
        progress(index, total)

    return GgufTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, blocks=blocks)
