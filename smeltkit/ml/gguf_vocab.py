"""A tokenizer.json as GGUF metadata, proven: llama.cpp must give the same ids for the whole reference corpus.

The pre-tokenizer's name is chosen by the split patterns in the file, as data; when the patterns are unknown every name
in the table is tried. Either way the proof is equality of ids, never a hash. Two families of vocabularies exist:
byte-level BPE ("gpt2") and SentencePiece-like BPE with byte fallback ("llama"); others are refused. Not proven, because
llama.cpp does not do it: normalization of text that is not in NFC.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smeltkit.errors import BadTokenizer
from smeltkit.ml import llama_vocab, reference_corpus
from smeltkit.ml.contract import GenerationContract, resolve_contract
from smeltkit.ml.gguf_io import write_gguf
from smeltkit.ml.model_files import read_json, template_of
from smeltkit.ml.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = _WORDS.replace("]?", "]?+") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_GPT4O,): "gpt-4o",
    (_CL100K,): "dbrx",
}
"""Split patterns of tokenizer.json, in order, to the name llama.cpp knows them by."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_metadata(folder: Path, architecture: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys, and `general.name`, for the tokenizer in `folder`; proven against llama.cpp.

    `architecture` holds the model's other keys, without which llama.cpp loads nothing. BadTokenizer if no encoding
    gives equal ids, if the kind is not supported, or if the vocabulary has more than `vocab_size` tokens.
    """
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    tokenizer.check_fits(vocab_size)
    declared = json.loads((folder / "tokenizer.json").read_bytes())
    if declared["model"].get("type") != "BPE":
        raise BadTokenizer(
            f"tokenizer.json: a {declared['model'].get('type')} vocabulary cannot be proven equal in llama.cpp; BPE can"
        )
    corpus = reference_corpus.texts(token["content"] for token in declared.get("added_tokens", []))
    expected = [tokenizer.encode(text) for text in corpus]
    common = _common(folder, declared, vocab_size, tokenizer)
    failure = ""
    for candidate in _candidates(declared, common["tokenizer.ggml.tokens"]):
        values = {**common, **candidate}
        found = _encode({**architecture, **values}, corpus)
        differing = [text for text, want, have in zip(corpus, expected, found, strict=True) if want != have]
        if not differing:
            return values
        failure = failure or f"{candidate['tokenizer.ggml.pre']!r} differs on {differing[0]!r}"
    raise BadTokenizer(
        f"tokenizer.json: llama.cpp has no pre-tokenizer that gives the same ids ({failure}); such a model cannot be"
        " stored as GGUF"
    )


def _candidates(declared: Mapping[str, Any], tokens: list[str]) -> Iterator[dict[str, Any]]:
    model = declared["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges", [])]
    if model.get("byte_fallback"):
        ranks = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        scores = [ranks.get(token, -1e6) for token in tokens]
        for has_prefix in (True, False):
            yield {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": has_prefix,
            }
        return
    if not merges:
        raise BadTokenizer("tokenizer.json: BPE without merges has no form in GGUF")
    known = PRE_TOKENIZERS.get(split_patterns(declared.get("pre_tokenizer")))
    for name in [known] if known else PRE_TOKENIZERS.values():
        yield {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }


def split_patterns(pre_tokenizer: Any) -> tuple[str, ...]:
    """The patterns by which a pre-tokenizer splits, in order; a kind without a pattern gives its own type as one."""
    if not isinstance(pre_tokenizer, Mapping):
        return ()
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return tuple(p for part in pre_tokenizer.get("pretokenizers", ()) for p in split_patterns(part))
    if kind == "ByteLevel":
        return (_GPT2,) if pre_tokenizer.get("use_regex", True) else ()
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (r"\p{N}",)
    pattern = pre_tokenizer.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping) and pre_tokenizer.get("behavior") == "Isolated":
        return (str(pattern.get("Regex", pattern.get("String"))),)
    return (f"<{kind}>",)


def _common(folder: Path, declared: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens, types = _tokens(declared, vocab_size)
    contract = read_contract(folder, tokenizer)
    unknown = declared["model"].get("unk_token")
    special = {
        "unknown_token_id": tokenizer.token_id(unknown) if unknown else None,
        **_special_ids(contract, tokenizer),
    }
    if special["unknown_token_id"] is not None:
        types[special["unknown_token_id"]] = UNKNOWN
    template = template_of(folder)
    has_rstrip = any(token.get("rstrip") for token in declared.get("added_tokens", []))
    return {
        "general.name": "phi-3" if has_rstrip else "model",  # llama.cpp strips after special tokens by this name
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{key}": id for key, id in special.items() if id is not None},
        "tokenizer.ggml.add_bos_token": contract.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        **({"tokenizer.chat_template": template} if template else {}),
    }


def _tokens(declared: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each id."""
    tokens, types = [f"[PAD{id}]" for id in range(vocab_size)], [UNUSED] * vocab_size
    for token, id in declared["model"]["vocab"].items():
        tokens[id], types[id] = token, BYTE if _BYTE_TOKEN.fullmatch(token) else NORMAL
    for added in declared.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    if len(set(tokens)) != vocab_size or "" in tokens:
        raise BadTokenizer("tokenizer.json: two ids have the same text, or none; llama.cpp needs one text an id")
    return tokens, types


def read_contract(folder: Path, tokenizer: Tokenizer) -> GenerationContract:
    """The generation contract of a folder: its contract.json, or what its other files declare together."""
    stored = read_json(folder / "contract.json")
    if stored:
        return GenerationContract.from_dict(stored)
    config, generation, settings = (
        read_json(folder / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    return resolve_contract(config, generation, settings, tokenizer, chat_template=template_of(folder))


def _special_ids(contract: GenerationContract, tokenizer: Tokenizer) -> dict[str, int | None]:
    end = tokenizer.token_id(contract.eos_text)
    stops = sorted(contract.stop_ids, key=lambda id: id != end)
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    return {
        "bos_token_id": contract.bos_id,
        "padding_token_id": contract.pad_id,
        **dict(zip(keys, stops, strict=False)),
    }


def _encode(metadata: Mapping[str, Any], corpus: Any) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocabulary.gguf")
        write_gguf(path, metadata, [])
        return llama_vocab.encode(path, corpus)
