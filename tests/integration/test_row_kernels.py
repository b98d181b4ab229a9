"""Our kernels for quantized weights against llama.cpp's own, on random models, by their logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.peers.random_model import FILE_TYPES, QWEN_1_5B, write_random_models
from services.inference.engine import Rows
from services.inference.fallbacks import cpu_flags
from services.inference.llama import LlamaConfig, LlamaEngine, has_row_kernels, system_info, use_row_kernels
from smeltkit.ml.gguf_io import GgufFile, GgufTensor, TensorInfo, write_gguf

LAYER = {
    **QWEN_1_5B,
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "tie_word_embeddings": False,
}
"""One layer, so that no later layer rounds again what an order of additions changed."""
TOKENS = np.random.default_rng(0).integers(0, 4096, 48).tolist()
ORDER, ROUNDING = 1e-5, 0.05
"""Differences, as a share of the largest logit: by the order of additions; by rounding rows otherwise."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file a scheme."""
    system_info()
    return write_random_models(tmp_path_factory.mktemp("rows"), FILE_TYPES, LAYER)


def logits(path: Path, rows_at_once: int, *, is_upstream: bool = False) -> NDArray[np.float32]:
    """(TOKENS, vocab_size) after each token, computed `rows_at_once` in a step."""
    count = len(TOKENS)
    config = LlamaConfig(
        slots=1, cells=256, is_split=True, batch_rows=count, output_rows=count, threads=2, is_upstream=is_upstream
    )
    engine, steps = LlamaEngine(path, config), []
    for start in range(0, count, rows_at_once):
        span = range(start, min(start + rows_at_once, count))
        rows = Rows(
            tokens=[TOKENS[i] for i in span], positions=list(span), slots=[0] * len(span), outputs=[True] * len(span)
        )
        steps.append(engine.decode(rows).copy())
    engine.close()
    return np.concatenate(steps)


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest difference, as a share of the largest logit of `other`."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_they_are_there_where_the_cpu_has_their_instructions() -> None:
    """Installed llama.cpp has them, or the installation is broken."""
    assert use_row_kernels(True) == ("avx512_vnni" in cpu_flags())


@pytest.mark.parametrize("scheme", FILE_TYPES)
def test_a_row_has_the_same_logits_whatever_is_beside_it(models: dict[str, Path], scheme: str) -> None:
    """Bit for bit: heights of tiles from one row to the most, and rows in several tiles."""
    alone = logits(models[scheme], 1)
    for rows in (2, 3, 5, 8, 11, 12, 13, 29, 48):
        assert difference(logits(models[scheme], rows), alone) <= (0 if has_row_kernels() else ROUNDING), rows


def test_they_compute_what_llama_cpp_computes(models: dict[str, Path]) -> None:
    """Up to the order of additions, and what it tips: a value that is rounded otherwise within the layer.

    Of Q8_0, whose rows llama.cpp rounds in one way only.
    """
    ours, theirs = logits(models["Q8_0"], 48), logits(models["Q8_0"], 48, is_upstream=True)
    assert has_row_kernels() == (not np.array_equal(ours, theirs)), "another switch than the one that was set"
    differences = [difference(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert np.median(differences) <= ORDER and max(differences) <= ROUNDING


@pytest.mark.parametrize("scheme", FILE_TYPES)
def test_they_are_no_further_from_exact_weights_than_llama_cpp(models: dict[str, Path], scheme: str) -> None:
    """Against the same values in float32, what rounding of rows costs is alike."""
    exact = logits(_in_float32(models[scheme]), 48, is_upstream=True)
    ours, theirs = (logits(models[scheme], 48, is_upstream=is_upstream) - exact for is_upstream in (False, True))
    assert float(np.sqrt(np.mean(ours**2))) <= 1.05 * float(np.sqrt(np.mean(theirs**2)))


def _in_float32(path: Path) -> Path:
    """The same file with every weight written out."""
    source, target = GgufFile.open(path), path.with_suffix(".f32.gguf")
    write_gguf(
        target, {**source.metadata, "general.file_type": 0}, [_plain(source, info) for info in source.tensors.values()]
    )
    return target


def _plain(source: GgufFile, info: TensorInfo) -> GgufTensor:
    def blocks() -> Iterator[NDArray[np.float32]]:
        yield gguf.dequantize(source.read(info.name), gguf.GGMLQuantizationType[info.dtype])

    return GgufTensor(name=info.name, dtype="F32", shape=info.shape, blocks=blocks)
