"""Small tokenizer.json files built in memory: byte-level BPE and SentencePiece style with byte fallback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from smeltkit.ml.tokenizer import Tokenizer, _byte_alphabet

WORD_START = "\u2581"


def added_tokens(first_id: int, contents: Sequence[str], *, special: bool = True) -> list[dict[str, Any]]:
    """Entries of `added_tokens` with consecutive ids."""
    return [
        {
            "id": first_id + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }
        for i, content in enumerate(contents)
    ]


def bpe_model(vocab: dict[str, int], merges: Sequence[Sequence[str]], **changes: Any) -> dict[str, Any]:
    """A `model` of type BPE."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": list(merges),
        **changes,
    }


def byte_level_file(
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), plain: Sequence[str] = (), **changes: Any
) -> dict[str, Any]:
    """A byte-level tokenizer of 256 bytes, whose id is the byte, then the added tokens from id 256."""
    vocab = dict(_byte_alphabet())
    added = added_tokens(256, special) + added_tokens(256 + len(special), plain, special=False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": bpe_model(vocab, []),
        **changes,
    }


def byte_fallback_file() -> dict[str, Any]:
    """A SentencePiece-like tokenizer: <unk>, <s>, </s>, 256 byte tokens, and the word `def`."""
    words = [WORD_START, "d", "e", "f", "x", f"{WORD_START}d", f"{WORD_START}de", f"{WORD_START}def"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(words)}
    merges = [[WORD_START, "d"], [f"{WORD_START}d", "e"], [f"{WORD_START}de", "f"]]
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    to_space = {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(0, ["<unk>", "<s>", "</s>"]),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": WORD_START}, to_mark]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                to_space,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": bpe_model(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True),
    }


def load(value: dict[str, Any]) -> Tokenizer:
    """The tokenizer of such a file."""
    return Tokenizer(json.dumps(value).encode())
