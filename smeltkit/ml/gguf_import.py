"""What a GGUF file says beside its weights, as the files of a Hugging Face folder: config, tokenizer, template.

The rebuilt tokenizer is proven like an exported one: it must give the ids that llama.cpp gives for the whole reference
corpus. Two facts leave no key in GGUF and are recovered: llama3 rope scaling from its factor tensor, and the merges of
a SentencePiece-like vocabulary from its scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smeltkit import limits
from smeltkit.errors import BadGguf, UnsupportedArchitecture
from smeltkit.ml import llama_vocab, reference_corpus, rope, weights
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.gguf_config import hf_config_of
from smeltkit.ml.gguf_io import GgufFile, shortest
from smeltkit.ml.gguf_vocab import CONTROL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED
from smeltkit.ml.tokenizer import Tokenizer

_ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "phi-2": "gpt-2",
    "llama4": "gpt-4o", "smaug-bpe": "dbrx",
}  # fmt: skip
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
_SPACE = "\u2581"
_FREQUENCIES, _LONG, _SHORT = weights.ROPE_TENSORS


def gguf_to_folder(path: Path, folder: Path) -> ModelConfig:
    """Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Returns the dimensions, after every tensor was found in its declared shape. BadGguf, TensorMismatch or
    UnsupportedArchitecture name what is wrong; BadGguf also if the rebuilt tokenizer gives other ids than llama.cpp.
    """
    file = GgufFile.open(path)
    config = hf_config_of(file.metadata, file.tensors)
    _recover_rope_factors(file, config)
    model = ModelConfig.from_hf(config)
    weights.match_gguf(model, file)
    tokens = _texts(file.metadata, "tokenizer.ggml.tokens")
    if len(tokens) != model.vocab_size:
        raise BadGguf(f"{path.name} has {len(tokens)} tokens for an embedding of {model.vocab_size} rows")
    special = {
        name: _special_id(file.metadata, name, len(tokens))
        for name in ("bos", "eos", "eot", "eom", "padding", "unknown")
    }
    ends = [id for id in (special["eos"], special["eot"], special["eom"]) if id is not None]
    _write(
        folder / "config.json", {**config, "bos_token_id": special["bos"], "eos_token_id": ends[0] if ends else None}
    )
    _write(folder / "generation_config.json", {"bos_token_id": special["bos"], "eos_token_id": ends})
    _write(folder / "tokenizer.json", _tokenizer_json(file.metadata, tokens, special))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        id = special[name]
        if id is not None:
            settings[key] = tokens[id]
    _write(folder / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _prove(path, folder, tokens, file.metadata)
    return model


def _recover_rope_factors(file: GgufFile, config: dict[str, Any]) -> None:
    if _FREQUENCIES in file.tensors:
        factors = file.read(_FREQUENCIES)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config["rope_scaling"] = scaling
        dimensions = int(config["head_dim"] * config["partial_rotary_factor"])
        expected = rope.llama3_frequency_factors(scaling, config["rope_theta"], dimensions)
        if factors.shape != (len(expected),) or not np.allclose(factors, expected, rtol=1e-4):
            raise UnsupportedArchitecture(f"{file.path.name}: {_FREQUENCIES} holds factors of no known rope scaling")
    if config.get("rope_scaling", {}).get("rope_type") == "longrope":
        for key, name in (("long_factor", _LONG), ("short_factor", _SHORT)):
            if name not in file.tensors:
                raise BadGguf(f"{file.path.name} declares longrope and lacks {name}")
            config["rope_scaling"][key] = [shortest(value) for value in file.read(name)]


def _tokenizer_json(
    metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, int | None]
) -> dict[str, Any]:
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise BadGguf("GGUF has no token type for every token")
    added = [
        {"id": id, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind in (CONTROL, UNKNOWN)}
        for id, (text, kind) in enumerate(zip(tokens, types.tolist(), strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    vocabulary = {text: id for id, text in enumerate(tokens) if types[id] != UNUSED}
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        body = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        body = _byte_fallback(metadata, vocabulary, tokens, special["unknown"])
    else:
        raise BadGguf(f"GGUF vocabulary of kind {kind!r} is not supported; gpt2 and llama are")
    return {
        "version": "1.0",
        "added_tokens": added,
        "post_processor": _post_processor(metadata, tokens, special),
        **body,
    }


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    declared = str(metadata.get("tokenizer.ggml.pre", "default"))
    pre = _ALIASES.get(declared, declared)
    patterns = next((patterns for patterns, name in PRE_TOKENIZERS.items() if name == pre), None)
    if patterns is None:
        raise BadGguf(
            f"GGUF pre-tokenizer {declared!r} is not known; known are {', '.join(PRE_TOKENIZERS.values())}."
            " Import the original Hugging Face folder instead"
        )
    merges = [merge.split(" ", 1) for merge in _texts(metadata, "tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise BadGguf("GGUF has a merge that is no pair of tokens")
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": pre == "llama-bpe"},
    }


def _byte_fallback(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], tokens: list[str], unknown: int | None
) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise BadGguf("GGUF has no score for every token")
    if max(map(len, vocabulary), default=0) > limits.TOKEN_MAX_CHARS:
        raise BadGguf(f"GGUF has a token of more than {limits.TOKEN_MAX_CHARS} characters")
    pairs = [
        (-float(scores[id]), id, text[:cut], text[cut:])
        for text, id in vocabulary.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [[left, right] for _, _, left, right in sorted(pairs)],
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _post_processor(
    metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, int | None]
) -> dict[str, Any] | None:
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    default = metadata.get("tokenizer.ggml.model") == "llama" or _ALIASES.get(pre, pre) == "llama-bpe"
    bos = special["bos"]
    if bos is None or metadata.get("tokenizer.ggml.add_bos_token", default) is not True:
        return None
    first, text = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _prove(path: Path, folder: Path, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    types = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    corpus = reference_corpus.texts(text for text, kind in zip(tokens, types, strict=True) if kind == CONTROL)
    for text, ids in zip(corpus, llama_vocab.encode(path, corpus), strict=True):
        if tokenizer.encode(text) != ids:
            raise BadGguf(
                f"{path.name}: the tokenizer rebuilt from metadata encodes {text!r} differently than llama.cpp"
            )


def _special_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id is not None and (not isinstance(id, int) or not 0 <= id < count):
        raise BadGguf(f"GGUF {name} token id {id!r} is not within 0 to {count - 1}")
    return id


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value:
        raise BadGguf(f"GGUF metadata lacks the list {key}")
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
