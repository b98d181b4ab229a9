"""Weights between a bundle's safetensors and the decoder: every tensor declared, none extra, types as stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smeltkit.errors import TensorMismatch
from smeltkit.ml import names
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.safetensors_io import SINGLE_FILE, SafetensorsFolder, write_safetensors
from smeltkit.ml.weights import match_safetensors

DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors type name to torch type of weights."""
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def load_decoder(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Decoder:
    """The decoder of a bundle's folder, cast to `dtype` if given; `options` as for Decoder.

    TensorMismatch if a tensor is missing, extra or of another shape, or holds a value that is not finite.
    """
    source = SafetensorsFolder.open(folder)
    stored = match_safetensors(config, source)
    with torch.device("meta"):
        decoder = Decoder(config, **options)
    state = {}
    for name, info in stored.items():
        value = to_torch(source.read(info.name), info.dtype)
        if not torch.isfinite(value).all():
            raise TensorMismatch(f"{info.file.name}: {info.name} holds values that are not finite; the file is damaged")
        state[name] = value.to(device=device, dtype=dtype or value.dtype)
    decoder.load_state_dict(state, assign=True)
    return decoder


def save_weights(folder: Path, config: ModelConfig, state: Mapping[str, Tensor], dtype: str) -> Path:
    """Writes canonical tensors as the bundle file `model.safetensors` of float type `dtype`; its path.

    TensorMismatch unless `state` holds exactly what the architecture declares, all of it finite.
    """

    def rows() -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
        for spec in config.tensors():
            value = state[spec.name].detach().to(device="cpu", dtype=DTYPES[dtype])
            if tuple(value.shape) != spec.shape or not torch.isfinite(value).all():
                raise TensorMismatch(f"{spec.name}: shape {tuple(value.shape)} is not {spec.shape}, or not all finite")
            yield names.canonical_to_hf(config.architecture, spec.name), dtype, to_numpy(value)

    expected = {spec.name for spec in config.tensors()}
    if expected != state.keys():
        raise TensorMismatch(
            f"weights differ from the architecture in {', '.join(sorted(expected ^ state.keys())[:5])}"
        )
    path = folder / SINGLE_FILE
    write_safetensors(path, rows())
    return path


def to_torch(values: npt.NDArray[Any], dtype: str) -> Tensor:
    """Values as `SafetensorsFolder.read` gives them (BF16 as uint16), as a tensor of their type."""
    if dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def to_numpy(value: Tensor) -> npt.NDArray[Any]:
    """A tensor on the CPU as `write_safetensors` takes it: BF16 as uint16."""
    value = value.detach().contiguous()
    return value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()


def type_name(dtype: torch.dtype) -> str:
    """The safetensors name of a float type."""
    return _NAMES[dtype]
