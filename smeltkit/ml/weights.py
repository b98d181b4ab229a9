"""Stored tensors against what the architecture declares: every one present, in its shape, in a float type, none more.

A loader that shrugs at a missing tensor gives a model that babbles; so a difference in either direction is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from smeltkit import limits
from smeltkit.errors import TensorMismatch, UnsupportedQuantization
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.gguf_io import TensorInfo as GgufTensorInfo
from smeltkit.ml.safetensors_io import SafetensorsFolder, TensorInfo

FLOAT_TYPES = ("F32", "F16", "BF16")
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of GGUF that hold rope settings, not weights."""
_BUFFER = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Info = TypeVar("Info", bound=_Shaped)


def match_safetensors(config: ModelConfig, source: SafetensorsFolder) -> dict[str, TensorInfo]:
    """Canonical name to stored tensor, in forward order; TensorMismatch names what is missing, extra or of wrong shape.

    Two extras are allowed because they say nothing new: the rotary buffers of old checkpoints, and under declared tying
    a head that equals the embedding byte for byte.
    """
    stored = {name: info for name, info in source.tensors.items() if not _BUFFER.fullmatch(name)}
    if config.tie_embeddings and "lm_head.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored.get("model.embed_tokens.weight")
        if embedding is None or not _is_same(source, head, embedding):
            raise TensorMismatch(
                f"{head.file.name}: lm_head.weight differs from model.embed_tokens.weight, but config.json declares"
                " tie_word_embeddings; set it to false, or remove the head"
            )
    for name, info in stored.items():
        if info.dtype not in FLOAT_TYPES:
            raise TensorMismatch(
                f"{info.file.name}: {name} is stored as {info.dtype}; weights must be F32, F16 or BF16"
            )
    return _match(config, stored, names.canonical_to_hf, source.folder.name)


def match_gguf(config: ModelConfig, source: GgufFile) -> dict[str, GgufTensorInfo]:
    """Canonical name to stored tensor of a GGUF file, in forward order; TensorMismatch as for safetensors."""
    stored = {name: info for name, info in source.tensors.items() if name not in ROPE_TENSORS}
    return _match(config, stored, names.canonical_to_gguf, source.path.name)


def read_slabs(values: npt.NDArray[Any], source: str, target: str, name: str) -> Iterator[npt.NDArray[Any]]:
    """`values` of float type `source` as float type `target`, a few rows at a time, each value checked to be finite.

    BF16 travels as uint16; F32 to BF16 rounds to nearest even. UnsupportedQuantization if F16 cannot hold a value.
    """
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    step = max(1, limits.CAST_SLAB_BYTES // (4 * rows.shape[1]))
    for begin in range(0, len(rows), step):
        slab = rows[begin : begin + step]
        exact = to_float32(slab, source)
        if not np.isfinite(exact).all():
            raise TensorMismatch(f"tensor {name} holds values that are not finite; the weights are damaged")
        if target == "F16" and source != "F16" and np.abs(exact).max(initial=0.0) > np.finfo(np.float16).max:
            raise UnsupportedQuantization(f"tensor {name} exceeds 65504, the largest F16 value; choose BF16")
        yield slab if source == target else from_float32(exact, target)


def to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values of float type `dtype` as float32, exactly."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Finite float32 values as float type `dtype`, rounded to nearest even; BF16 as uint16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16 if dtype == "F16" else np.float32, copy=False)


def _match(
    config: ModelConfig, stored: Mapping[str, Info], rename: Callable[[str, str], str], where: str
) -> dict[str, Info]:
    expected = {rename(config.architecture, spec.name): spec for spec in config.tensors()}
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise TensorMismatch(
            f"{where}: weights do not fit config.json ({config.architecture}, {config.layers} layers): missing"
            f" {_some(missing)}; not declared {_some(extra)}"
        )
    for name, spec in expected.items():
        if stored[name].shape != spec.shape:
            raise TensorMismatch(
                f"{where}: {name} has shape {list(stored[name].shape)}, config.json {list(spec.shape)}"
            )
    return {spec.name: stored[name] for name, spec in expected.items()}


def _is_same(source: SafetensorsFolder, first: TensorInfo, second: TensorInfo) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return bool(np.array_equal(source.read(first.name), source.read(second.name)))


def _some(found: list[str]) -> str:
    return (", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")) or "none"
