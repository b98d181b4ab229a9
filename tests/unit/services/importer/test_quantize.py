"""A quantization is held against its forecast, by type and by size, and its process cannot hurt the service."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.importer.quantize import quantize, verify
from smeltkit.errors import JobCancelled, QuantizationMismatch, UnsupportedQuantization
from smeltkit.ml.gguf_convert import convert_to_gguf, read_config
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.quantization import planned_size_bytes, planned_types
from smeltkit.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with its GGUF."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", hidden_size=256, intermediate_size=1280)
    convert_to_gguf(folder, folder / "model.gguf")
    return folder


def test_result_has_the_forecast_types(model: Path, tmp_path: Path) -> None:
    """R-003, R-004: and progress ends within the forecast."""
    config, seen = read_config(model), []
    quantize(model / "model.gguf", tmp_path / "q.gguf", config, "Q4_K_M", threads=1, progress=seen.append)
    stored = GgufFile.open(tmp_path / "q.gguf").tensors
    assert {name: info.dtype for name, info in stored.items()} == planned_types(config, "Q4_K_M")
    assert seen and max(seen) <= (tmp_path / "q.gguf").stat().st_size


def test_type_that_differs_is_listed(model: Path) -> None:
    """R-003: the source itself, passed off as quantized, is the case that happened."""
    config, stored = read_config(model), GgufFile.open(model / "model.gguf")
    with pytest.raises(QuantizationMismatch, match=r"blk\.0\.attn_k\.weight is BF16 instead of Q8_0"):
        verify(stored, planned_types(config, "Q8_0"), planned_size_bytes(config, "Q8_0"), "Q8_0")


def test_size_that_differs_by_more_than_five_percent_is_refused(model: Path) -> None:
    """R-004: right types and a wrong size mean that something was lost."""
    config, stored = read_config(model), GgufFile.open(model / "model.gguf")
    size_bytes = planned_size_bytes(config, "BF16")
    verify(stored, planned_types(config, "BF16"), int(size_bytes * 1.04), "BF16")
    with pytest.raises(QuantizationMismatch, match="forecast"):
        verify(stored, planned_types(config, "BF16"), int(size_bytes * 1.06), "BF16")


def test_source_that_llama_refuses_is_a_typed_error(model: Path, tmp_path: Path) -> None:
    """R-108: the process tells a refusal from a crash, and its last words are the message."""
    (tmp_path / "broken.gguf").write_bytes((model / "model.gguf").read_bytes()[:5000])
    with pytest.raises(QuantizationMismatch, match="quantizer refuses: "):
        quantize(
            tmp_path / "broken.gguf",
            tmp_path / "q.gguf",
            read_config(model),
            "Q8_0",
            threads=1,
            progress=lambda _: None,
        )


def test_cancel_ends_the_process(model: Path, tmp_path: Path) -> None:
    """What progress raises comes out, and nobody keeps computing."""

    def stop(_: int) -> None:
        raise JobCancelled("stop")

    with pytest.raises(JobCancelled):
        quantize(model / "model.gguf", tmp_path / "q.gguf", read_config(model), "Q4_K_M", threads=1, progress=stop)


def test_scheme_that_does_not_fit_is_refused_before_the_process(model: Path, tmp_path: Path) -> None:
    """The forecast is made first."""
    with pytest.raises(UnsupportedQuantization, match="known are"):
        quantize(model / "model.gguf", tmp_path / "q", read_config(model), "Q9", threads=1, progress=lambda _: None)
    assert not list(tmp_path.iterdir())
