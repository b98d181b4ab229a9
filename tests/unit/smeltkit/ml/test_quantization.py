"""The forecast of storage types against what llama.cpp's quantizer really stores."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import LlamaFileType

from services.inference.llama import use_row_kernels
from smeltkit.errors import UnsupportedQuantization
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.quantization import SCHEMES, check_source, coverage, planned_size_bytes, planned_types
from smeltkit.testing.tiny_models import tiny_config, write_tiny_model

use_row_kernels(False)  # llama.cpp reads what kernels there are with its first model, and later tests ask for ours

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, layers that get more bits": (
        "llama",
        {"hidden_size": 256, "head_dim": 32, "intermediate_size": 512, "num_hidden_layers": 17},
    ),
    "qwen2, tied": (
        "qwen2",
        {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512, "tie_word_embeddings": True},
    ),
    "qwen3, rows that no k-quant divides": ("qwen3", {"hidden_size": 288, "head_dim": 64, "num_hidden_layers": 8}),
    "phi3, fused projections": (
        "phi3",
        {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 768, "num_hidden_layers": 9},
    ),
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    """A converted tiny model."""
    folder = tmp_path_factory.mktemp("model")
    architecture, shape = MODELS[request.param]
    config = write_tiny_model(folder, architecture, **shape)
    convert_to_gguf(folder, folder / "model.gguf")
    return config, folder / "model.gguf"


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"BF16"}))
def test_llama_stores_what_is_forecast(model: tuple[ModelConfig, Path], scheme: str, tmp_path: Path) -> None:
    """R-003, R-004: type by type and byte by byte, fallbacks included."""
    config, path = model
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = SCHEMES[scheme].file_type, 1
    target = tmp_path / "quantized.gguf"
    assert llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(parameters)) == 0
    stored = GgufFile.open(target).tensors
    assert {name: info.dtype for name, info in stored.items()} == planned_types(config, scheme)
    assert sum(info.size_bytes for info in stored.values()) == planned_size_bytes(config, scheme)


def test_file_type_numbers_are_those_of_the_gguf_package() -> None:
    """Independent table."""
    for name, rules in SCHEMES.items():
        reference = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
        assert rules.file_type == LlamaFileType[reference].value


def test_rows_without_any_fitting_block_are_refused_with_the_tensor() -> None:
    """IMP-16: llama.cpp would keep F16 in silence; here the name, the row and the remedy are told."""
    config = ModelConfig.from_hf(tiny_config("qwen2", intermediate_size=100))
    with pytest.raises(UnsupportedQuantization, match=r"layers\.0\.mlp\.down\.weight has 100; choose F16"):
        planned_types(config, "Q4_K_M")


def test_unknown_scheme_lists_the_known() -> None:
    """The message is the remedy."""
    with pytest.raises(UnsupportedQuantization, match="Q4_K_M"):
        planned_types(ModelConfig.from_hf(tiny_config("qwen2")), "q3")


@pytest.mark.parametrize("source", ["Q8_0", "Q4_K_M", "IQ4_XS"])
def test_lost_bits_do_not_come_back(source: str) -> None:
    """R-020: only float bundles are quantized."""
    with pytest.raises(UnsupportedQuantization, match="lineage"):
        check_source(source, "Q4_0")


def test_same_scheme_again_is_refused() -> None:
    """IMP-17."""
    with pytest.raises(UnsupportedQuantization, match="already"):
        check_source("F16", "F16")


def test_coverage_counts_all_parameters() -> None:
    """IMP-16: nearly all of a decoder is matrices."""
    config = ModelConfig.from_hf(tiny_config("qwen2"))
    assert coverage(config, "Q8_0") > 0.99 and coverage(config, "F16") == 0
