"""Complete Hugging Face folders of random weights, small enough for any test, in every supported architecture.

The default shapes are odd on purpose: hidden / heads != head_dim where the architecture allows it, an intermediate size
above 4 * hidden, fewer key-value heads than heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from smeltkit.ml import names, weights
from smeltkit.ml.arch import ARCHITECTURES, ModelConfig
from smeltkit.ml.gguf_vocab import PRE_TOKENIZERS
from smeltkit.ml.reference_corpus import texts
from smeltkit.ml.safetensors_io import INDEX_FILE, SINGLE_FILE, write_safetensors

VOCAB_SIZE = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SHAPES: Mapping[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24},
    "qwen2": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
    "phi3": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
}


def tiny_config(architecture: str, **overrides: Any) -> dict[str, Any]:
    """A config.json of a two-layer model; `overrides` replace or add keys."""
    return {
        "architectures": [ARCHITECTURES[architecture].hf_class],
        "model_type": architecture,
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 2,
        "intermediate_size": 416,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **_SHAPES[architecture],
        "eos_token_id": VOCAB_SIZE - 1,
        "bos_token_id": None,
        "pad_token_id": VOCAB_SIZE - 3,
        **overrides,
    }


def write_tiny_model(
    folder: Path,
    architecture: str,
    *,
    seed: int = 0,
    dtype: str = "BF16",
    shards: int = 1,
    is_chat: bool = True,
    **overrides: Any,
) -> ModelConfig:
    """Writes a whole model folder (weights, config, tokenizer, template, licence) and returns its dimensions."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_hf(config)
    generator = np.random.default_rng(seed)
    tensors = []
    for spec in model.tensors():
        spread = 1.0 if spec.name == "embed.weight" else spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 0.1
        values = generator.normal(1.0 if spec.name.endswith("norm.weight") else 0.0, spread, spec.shape)
        stored = weights.from_float32(values.astype(np.float32), dtype)
        tensors.append((names.canonical_to_hf(architecture, spec.name), dtype, stored))
    _write_weights(folder, tensors, shards)
    write_tokenizer(folder, is_chat=is_chat)
    (folder / "LICENSE").write_text("SPDX-License-Identifier: Apache-2.0\n")
    return model


def write_tokenizer(folder: Path, *, pre_tokenizer: str = "qwen2", is_chat: bool = True) -> None:
    """Writes a byte-level BPE tokenizer trained on the reference corpus, its settings, and ChatML or no template."""
    patterns = next(patterns for patterns, name in PRE_TOKENIZERS.items() if name == pre_tokenizer)
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre_tokenizer == "llama-bpe"))
    tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts()) * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "chat_template": TEMPLATE if is_chat else "",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def _write_weights(folder: Path, tensors: list[tuple[str, str, Any]], shards: int) -> None:
    if shards == 1:
        write_safetensors(folder / SINGLE_FILE, tensors)
        return
    weight_map: dict[str, str] = {}
    for index in range(shards):
        name, part = f"model-{index + 1:05d}-of-{shards:05d}.safetensors", tensors[index::shards]
        write_safetensors(folder / name, part)
        weight_map |= {tensor[0]: name for tensor in part}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
