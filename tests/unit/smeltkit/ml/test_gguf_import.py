"""GGUF import: metadata becomes the folder it was made from, and what does not fit is a typed error."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, trainers

from smeltkit.errors import BadGguf, SmeltError, TensorMismatch, UnsupportedArchitecture
from smeltkit.ml import gguf_import, reference_corpus
from smeltkit.ml.gguf_convert import convert_to_gguf, read_config
from smeltkit.ml.gguf_import import gguf_to_folder
from smeltkit.ml.gguf_io import GgufFile, GgufTensor, write_gguf
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.testing.tiny_models import VOCAB_SIZE, write_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}


def export(folder: Path, architecture: str, **overrides: Any) -> Path:
    """A tiny model as GGUF; the file's path."""
    write_tiny_model(folder, architecture, **overrides)
    convert_to_gguf(folder, folder / "model.gguf", dtype="F16")
    return folder / "model.gguf"


def rebuilt(path: Path, folder: Path) -> Path:
    """The folder that a GGUF file becomes."""
    folder.mkdir()
    gguf_to_folder(path, folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("phi3", {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 256, "rope_scaling": LONG}),
    ],
    ids=str,
)
def test_dimensions_survive_export_and_import(architecture: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """R-020: also what has no key in GGUF, recovered from tensors."""
    path = export(tmp_path / "hf", architecture, **overrides)
    assert read_config(rebuilt(path, tmp_path / "back")) == read_config(tmp_path / "hf")


def test_tokenizer_template_and_stops_survive(tmp_path: Path) -> None:
    """R-018: ids of the reference corpus are identical after export and import."""
    back = rebuilt(export(tmp_path / "hf", "qwen2"), tmp_path / "back")
    first, second = (Tokenizer.from_file(folder / "tokenizer.json") for folder in (tmp_path / "hf", back))
    corpus = reference_corpus.texts(["<|im_start|>", "<|im_end|>"])
    assert [second.encode(text) for text in corpus] == [first.encode(text) for text in corpus]
    ends = json.loads((back / "generation_config.json").read_text())["eos_token_id"]
    assert ends == json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert "<|im_start|>" in (back / "chat_template.jinja").read_text()


def write_byte_fallback_tokenizer(folder: Path) -> None:
    """Replaces the tokenizer by a SentencePiece-like one: every split of a token into tokens is a merge."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(
        list(reference_corpus.texts()) * 4, trainers.BpeTrainer(vocab_size=280, show_progress=False)
    )
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = ["\u2581", *(text for text, _ in learned if text.isascii() or "\u2581" in text)]
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = list(dict.fromkeys([*base, *sorted(pieces, key=len)]))[:VOCAB_SIZE]
    vocabulary = {text: id for id, text in enumerate(texts)}
    normal = texts[len(base) :]
    merges = [
        [text[:cut], text[cut:]]
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    added = [
        {"id": id, "content": base[id], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for id in range(3)
    ]  # fmt: skip
    value = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(value))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))


def test_byte_fallback_vocabulary_survives(tmp_path: Path) -> None:
    """R-018: the Llama 2 family; scores carry the order of merges out and back."""
    write_tiny_model(tmp_path / "hf", "llama", eos_token_id=2, pad_token_id=None)
    write_byte_fallback_tokenizer(tmp_path / "hf")
    convert_to_gguf(tmp_path / "hf", tmp_path / "model.gguf", dtype="F16")
    metadata = GgufFile.open(tmp_path / "model.gguf").metadata
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    back = rebuilt(tmp_path / "model.gguf", tmp_path / "back")
    first, second = (Tokenizer.from_file(folder / "tokenizer.json") for folder in (tmp_path / "hf", back))
    corpus = reference_corpus.texts(["<s>", "</s>"])
    assert [second.encode(text) for text in corpus] == [first.encode(text) for text in corpus]
    assert second.leading_ids() == [1]


def change(path: Path, edit: Callable[[dict[str, Any]], object], drop: str = "") -> Path:
    """The file with other metadata, or without one tensor; its path."""
    file = GgufFile.open(path)
    metadata = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    edit(metadata)
    tensors = [
        GgufTensor(name=name, dtype=info.dtype, shape=info.shape, blocks=lambda name=name: [file.read(name)])
        for name, info in file.tensors.items()
        if name != drop
    ]
    write_gguf(path.with_name("changed.gguf"), metadata, tensors)
    return path.with_name("changed.gguf")


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], type[SmeltError], str]] = {
    "no architecture": (lambda m: m.pop("general.architecture"), BadGguf, "lacks"),
    "unknown architecture": (lambda m: m.update({"general.architecture": "mamba"}), BadGguf, "mamba"),
    "heads a layer": (lambda m: m.update({"qwen2.attention.head_count_kv": [2, 2]}), BadGguf, "one number"),
    "text for a base": (lambda m: m.update({"qwen2.rope.freq_base": "1e4"}), BadGguf, "freq_base"),
    "number for a text": (lambda m: m.update({"qwen2.rope.scaling.type": 7}), BadGguf, "text"),
    "no block count": (lambda m: m.pop("qwen2.block_count"), BadGguf, "block_count"),
    "no heads": (lambda m: m.update({"qwen2.attention.head_count": 0}), BadGguf, "head_count"),
    "text for a number": (lambda m: m.update({"qwen2.embedding_length": "many"}), BadGguf, "embedding_length"),
    "experts": (lambda m: m.update({"qwen2.expert_count": 8}), UnsupportedArchitecture, "expert_count"),
    "two widths": (lambda m: m.update({"qwen2.attention.value_length": 8}), UnsupportedArchitecture, "width"),
    "unknown rope": (lambda m: m.update({"qwen2.rope.scaling.type": "su"}), UnsupportedArchitecture, "su"),
    "no tokens": (lambda m: m.pop("tokenizer.ggml.tokens"), BadGguf, "tokens"),
    "fewer tokens": (lambda m: m["tokenizer.ggml.tokens"].pop(), BadGguf, "embedding"),
    "no token types": (lambda m: m.pop("tokenizer.ggml.token_type"), BadGguf, "type"),
    "no merges": (lambda m: m.pop("tokenizer.ggml.merges"), BadGguf, "merges"),
    "merge of one": (lambda m: m["tokenizer.ggml.merges"].append("x"), BadGguf, "pair"),
    "unknown vocabulary": (lambda m: m.update({"tokenizer.ggml.model": "rwkv"}), BadGguf, "rwkv"),
    "unknown pre-tokenizer": (lambda m: m.update({"tokenizer.ggml.pre": "viking"}), BadGguf, "Hugging Face folder"),
    "stop beyond the vocabulary": (lambda m: m.update({"tokenizer.ggml.eos_token_id": 10**6}), BadGguf, "eos"),
}


@pytest.mark.parametrize(("edit", "error", "match"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_metadata_is_a_typed_error(
    edit: Callable[[dict[str, Any]], object], error: type[SmeltError], match: str, qwen2: Path, tmp_path: Path
) -> None:
    """What is wrong is named."""
    with pytest.raises(error, match=match):
        rebuilt(change(qwen2, edit), tmp_path / "back")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file."""
    return export(tmp_path_factory.mktemp("hf"), "qwen2")


def test_missing_tensor_is_named(qwen2: Path, tmp_path: Path) -> None:
    """R-015: also in GGUF, where llama.cpp would say it at load time."""
    with pytest.raises(TensorMismatch, match=r"blk\.1\.ffn_down\.weight"):
        rebuilt(change(qwen2, lambda metadata: None, drop="blk.1.ffn_down.weight"), tmp_path / "back")


def test_unknown_rope_factors_are_refused(tmp_path: Path) -> None:
    """Factors of no known scaling cannot be told in a config.json."""
    path = export(tmp_path / "hf", "llama", rope_scaling={**LLAMA3, "original_max_position_embeddings": 64})
    with pytest.raises(UnsupportedArchitecture, match="rope_freqs"):
        rebuilt(path, tmp_path / "back")


values = (
    st.booleans()
    | st.integers(0, 2**40)
    | st.floats(width=32)
    | st.text(max_size=6)
    | st.lists(st.integers(-9, 9), min_size=1, max_size=3)
    | st.lists(st.text(max_size=3), min_size=1, max_size=3)
)


@given(st.data())
def test_any_metadata_gives_a_folder_or_a_typed_error(qwen2: Path, data: st.DataObject) -> None:
    """Fuzz: keys of a valid file replaced or removed; never a crash."""
    keys = [
        *GgufFile.open(qwen2).metadata,
        "qwen2.rope.scaling.factor",
        "qwen2.rope.scaling.type",
        "qwen2.expert_count",
    ]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), values | st.none(), max_size=3))

    def edit(metadata: dict[str, Any]) -> None:
        metadata.update(changes)
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(gguf_import, "_prove"), suppress(SmeltError):
        gguf_to_folder(change(qwen2, edit), Path(folder))
