"""Conversion to GGUF: llama.cpp must give the logits that transformers gives for the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from services.inference.llama import use_row_kernels
from smeltkit.errors import (
    BadModelConfig,
    BadTokenizer,
    TensorMismatch,
    UnsupportedArchitecture,
    UnsupportedQuantization,
)
from smeltkit.ml import gguf_convert, gguf_vocab, names
from smeltkit.ml.gguf_config import metadata_of
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.safetensors_io import write_safetensors
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.testing.tiny_models import write_tiny_model, write_tokenizer

use_row_kernels(False)  # llama.cpp reads what kernels there are with its first model, and later tests ask for ours

PROMPT = "def add(a, b):\n    return a + b\n\nclass Point:\n\tdef __init__(self):\n\t\tpass\n"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                                "attention_factor": 1.3}}),
    ("qwen2", {}),
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    ("phi3", {}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("phi3", {"original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **FACTORS}}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    """transformers shows progress bars and advice otherwise."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits (tokens, vocab) of llama.cpp, with a float32 cache so that only its arithmetic differs."""
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False)
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
    finally:
        model.close()


def difference(folder: Path) -> float:
    """Converts a folder; largest difference of logits to transformers, as a share of the largest logit."""
    convert_to_gguf(folder, folder / "model.gguf", dtype="F32")
    ids = (Tokenizer.from_file(folder / "tokenizer.json").encode(PROMPT) * 3)[:120]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    return float(np.abs(llama_logits(folder / "model.gguf", ids) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("architecture", "overrides"), MODELS, ids=str)
def test_logits_are_those_of_transformers(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """R-022: odd shapes, biases, qk-norm, fused projections, ties and every rope scaling, to 1e-4."""
    write_tiny_model(tmp_path, architecture, **overrides)
    assert difference(tmp_path) < 1e-4


def swapped(architecture: str, name: str) -> str:
    """The name map with gate and up exchanged: every shape still fits."""
    other = name.replace(".gate.", ".x.").replace(".up.", ".gate.").replace(".x.", ".up.")
    return names.canonical_to_gguf(architecture, other)


@pytest.mark.parametrize(
    "bug",
    [
        ("permute_rotary", lambda values, heads: values),
        ("permute_rotary", lambda values, heads: values[::-1].copy()),
        ("llama3_frequency_factors", lambda scaling, theta, rotary: [1.0] * (rotary // 2)),
        ("names", SimpleNamespace(canonical_to_gguf=swapped)),
    ],
    ids=["rows not permuted", "rows reversed", "rope scaling forgotten", "names exchanged"],
)
def test_each_bug_alone_is_seen_in_the_logits(
    bug: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-025: no bug hides behind a reader with the same one, because the reader is llama.cpp."""
    write_tiny_model(tmp_path, "llama", rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    monkeypatch.setattr(gguf_convert, *bug)
    assert difference(tmp_path) > 1e-2


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_float_types_convert_exactly_or_rounded(source: str, target: str, tmp_path: Path) -> None:
    """Matrices in the requested type, vectors in float32, values those of torch's own rounding."""
    write_tiny_model(tmp_path, "qwen2", dtype=source)
    report = convert_to_gguf(tmp_path, tmp_path / "model.gguf", dtype=target)
    file = GgufFile.open(tmp_path / "model.gguf")
    assert report.size_bytes == (tmp_path / "model.gguf").stat().st_size
    assert report.tensors == {name: info.dtype for name, info in file.tensors.items()}
    assert {info.dtype for info in file.tensors.values() if len(info.shape) > 1} == {target}
    assert {info.dtype for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}


def test_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    """Deterministic, so that a cached stage is the stage."""
    write_tiny_model(tmp_path, "llama", shards=3)
    for name in ("a.gguf", "b.gguf"):
        convert_to_gguf(tmp_path, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_failed_conversion_leaves_no_file(tmp_path: Path) -> None:
    """Nothing half-written: the last tensor is damaged."""
    write_tiny_model(tmp_path, "llama", dtype="F32")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(TensorMismatch, match="not finite"):
        convert_to_gguf(tmp_path, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_memory_is_bound_by_the_largest_tensor(tmp_path: Path) -> None:
    """R-026: many equal tensors need at most 4 times the largest one above what the process needs anyway."""
    config = write_tiny_model(tmp_path, "qwen2", intermediate_size=98_304, num_hidden_layers=3)
    zeros = [
        (names.canonical_to_hf("qwen2", spec.name), "F32", np.zeros(spec.shape, np.float32))
        for spec in config.tensors()
    ]
    size_bytes = write_safetensors(tmp_path / "model.safetensors", zeros)
    largest = max(values.nbytes for _, _, values in zeros)
    command = (
        "import resource, sys; from pathlib import Path; from smeltkit.ml.gguf_convert import convert_to_gguf\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "folder = Path(sys.argv[1]); before = peak(); convert_to_gguf(folder, folder / 'model.gguf', dtype='F16')\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * largest < size_bytes / 2


@pytest.mark.parametrize(
    ("architecture", "overrides", "match"),
    [
        ("qwen2", {"head_dim": 24}, "hidden_size"),
        ("phi3", {"head_dim": 24}, "hidden_size"),
        ("qwen3", {"attention_bias": True}, "output_bias"),
        ("qwen2", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, "llama3"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "whole heads"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
                                    "beta_fast": 16.0}}, "betas"),
    ],
    ids=str,
)  # fmt: skip
def test_what_llama_would_run_wrongly_is_refused(
    architecture: str, overrides: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """IMP-23: at plan time, with the reason; not by a model that babbles."""
    config = write_tiny_model(tmp_path, architecture, **overrides)
    with pytest.raises(UnsupportedArchitecture, match=match):
        metadata_of(config)


def test_quantized_type_is_not_a_conversion(tmp_path: Path) -> None:
    """R-003: never a silent F16."""
    with pytest.raises(UnsupportedQuantization, match="Q4_0"):
        convert_to_gguf(tmp_path, tmp_path / "model.gguf", dtype="Q4_0")


def test_missing_config_is_named(tmp_path: Path) -> None:
    """IMP-7."""
    with pytest.raises(BadModelConfig, match=r"config\.json"):
        convert_to_gguf(tmp_path, tmp_path / "model.gguf")


@pytest.mark.parametrize("pre", sorted(gguf_vocab.PRE_TOKENIZERS.values()))
def test_known_pre_tokenizers_give_equal_ids(pre: str, tmp_path: Path) -> None:
    """R-018, IMP-10: every name in the table stands for its patterns, proven by ids."""
    config = write_tiny_model(tmp_path, "llama")
    write_tokenizer(tmp_path, pre_tokenizer=pre)
    values = gguf_vocab.vocabulary_metadata(tmp_path, metadata_of(config), config.vocab_size)
    assert values["tokenizer.ggml.pre"] == pre


def edit_tokenizer(folder: Path, **changes: Any) -> None:
    """Replaces top-level parts of a tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_pattern_that_splits_alike_is_found_by_ids(tmp_path: Path) -> None:
    """IMP-10: no hash list; the same split written differently is proven, not guessed."""
    config = write_tiny_model(tmp_path, "llama")
    declared = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    declared["pretokenizers"][0]["pattern"]["Regex"] += r"|[\s\S]"
    edit_tokenizer(tmp_path, pre_tokenizer=declared)
    values = gguf_vocab.vocabulary_metadata(tmp_path, metadata_of(config), config.vocab_size)
    assert values["tokenizer.ggml.pre"] == "qwen2"


def test_pattern_that_llama_cannot_do_is_refused(tmp_path: Path) -> None:
    """R-018: other ids would be another model."""
    config = write_tiny_model(tmp_path, "llama")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    edit_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    with pytest.raises(BadTokenizer, match="same ids"):
        gguf_vocab.vocabulary_metadata(tmp_path, metadata_of(config), config.vocab_size)


def test_two_ids_with_one_text_are_refused(tmp_path: Path) -> None:
    """llama.cpp would abort the process on it."""
    config = write_tiny_model(tmp_path, "llama", vocab_size=400)
    declared = json.loads((tmp_path / "tokenizer.json").read_text())
    hole = {**declared["added_tokens"][0], "id": 390, "content": "[PAD391]"}
    edit_tokenizer(tmp_path, added_tokens=[*declared["added_tokens"], hole])
    with pytest.raises(BadTokenizer, match="same text"):
        gguf_vocab.vocabulary_metadata(tmp_path, metadata_of(config), config.vocab_size)


def test_stop_ids_and_template_are_embedded(tmp_path: Path) -> None:
    """R-017: the exported file stops where the bundle stops."""
    write_tiny_model(tmp_path, "qwen3")
    convert_to_gguf(tmp_path, tmp_path / "model.gguf")
    metadata = GgufFile.open(tmp_path / "model.gguf").metadata
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_id("<|im_end|>")
    assert metadata["tokenizer.ggml.eot_token_id"] == tokenizer.token_id("<|endoftext|>")
    assert "<|im_start|>" in metadata["tokenizer.chat_template"]
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_embedding_larger_than_the_vocabulary_is_padded(tmp_path: Path) -> None:
    """Rows without a token exist in many models."""
    write_tiny_model(tmp_path, "qwen3", vocab_size=416)
    convert_to_gguf(tmp_path, tmp_path / "model.gguf", dtype="F16")
    assert len(GgufFile.open(tmp_path / "model.gguf").metadata["tokenizer.ggml.tokens"]) == 416


def test_unigram_vocabulary_is_refused(tmp_path: Path) -> None:
    """No proof, no export."""
    config = write_tiny_model(tmp_path, "llama")
    scores = [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *scores], "byte_fallback": True}
    edit_tokenizer(tmp_path, model=model, added_tokens=[], pre_tokenizer=None, normalizer=None, decoder=None)
    with pytest.raises(BadTokenizer, match="Unigram"):
        gguf_vocab.vocabulary_metadata(tmp_path, metadata_of(config), config.vocab_size)
