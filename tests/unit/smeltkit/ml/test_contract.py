"""The generation contract is resolved from every place that may declare a part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import byte_fallback_file, byte_level_file, load

from smeltkit.errors import BadModelConfig, BadTemplate
from smeltkit.ml.contract import GenerationContract, Reply, resolve_contract
from smeltkit.ml.tokenizer import Tokenizer

ORE = Path(__file__).parents[4] / "examples/models/ore-11m"
BYTES = load(byte_level_file())
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def _resolve(config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, **changes: Any) -> Any:
    tokenizer_config = changes.pop("tokenizer_config", {})
    tokenizer = changes.pop("tokenizer", BYTES)
    changes.setdefault("chat_template", "{{ messages }}")
    return resolve_contract(CONFIG | (config or {}), generation, tokenizer_config, tokenizer, **changes)


def _ore() -> GenerationContract:
    files = [
        json.loads((ORE / f"{name}.json").read_text()) for name in ("config", "generation_config", "tokenizer_config")
    ]
    return resolve_contract(*files, Tokenizer.from_file(ORE / "tokenizer.json"))


def test_shipped_model_has_the_stop_set_of_all_its_files() -> None:
    """R-031: 8186 is also the padding token, and stays because generation_config.json declares it."""
    contract = _ore()
    assert contract.stop_ids == (8186, 8188)
    assert contract.stop_sources == {
        8186: ("generation_config.json", "tokenizer marker <|endoftext|>"),
        8188: ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer marker <|im_end|>"),
    }
    assert (contract.pad_id, contract.bos_id, contract.add_bos) == (8186, 8186, False)
    assert (contract.context_tokens, contract.task, contract.thinking) == (2048, "chat", None)
    assert (contract.bos_text, contract.eos_text) == ("", "<|im_end|>")


def test_padding_token_is_no_stop_unless_declared() -> None:
    """R-031."""
    assert _resolve({"eos_token_id": 258, "pad_token_id": 256}).stop_ids == (258,)
    assert _resolve({"eos_token_id": [258, 256], "pad_token_id": 256}).stop_ids == (256, 258)


def test_marker_counts_only_as_a_special_token() -> None:
    """R-031: the text </s> in a vocabulary of plain words ends nothing."""
    plain = load(byte_level_file(special=["<|im_end|>"], plain=["</s>"]))
    assert _resolve(tokenizer=plain).stop_sources == {256: ("tokenizer marker <|im_end|>",)}


def test_model_without_any_stop_token_is_refused() -> None:
    with pytest.raises(BadModelConfig, match="set eos_token_id"):
        _resolve(tokenizer=load(byte_level_file(special=[])))


@pytest.mark.parametrize("id", [300, -1, True, 1.5, "</s>", [258, 999]])
def test_stop_id_outside_the_vocabulary_is_refused(id: Any) -> None:
    with pytest.raises(BadModelConfig, match="run from 0 to 299"):
        _resolve(generation={"eos_token_id": id})


def test_beginning_of_sequence_follows_the_tokenizer_file_unless_declared() -> None:
    spm = load(byte_fallback_file())
    begin = {"bos_token": "<s>"}
    assert _resolve(tokenizer=spm, tokenizer_config=begin).add_bos
    assert not _resolve(tokenizer=spm, tokenizer_config=begin | {"add_bos_token": False}).add_bos
    assert not _resolve(tokenizer=spm).add_bos
    assert _resolve({"bos_token_id": 256}, tokenizer_config={"add_bos_token": True}).add_bos


def test_template_decides_the_task() -> None:
    assert _resolve(chat_template="{{ messages }}").task == "chat"
    assert _resolve(chat_template="").task == "completion"
    plain = load(byte_level_file(special=["<|endoftext|>"]))
    assert _resolve(chat_template=None, tokenizer=plain).task == "completion"
    inside = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}
    assert _resolve(chat_template=None, tokenizer_config=inside).task == "chat"


def test_lost_template_of_a_chat_model_names_the_file_and_the_token() -> None:
    """R-017."""
    with pytest.raises(BadTemplate, match=r"chat_template\.jinja is missing.*<\|im_start\|>"):
        _resolve(chat_template=None)


def test_thinking_markers_come_from_added_tokens() -> None:
    """R-038."""
    thinker = load(byte_level_file(plain=["<think>", "</think>"]))
    assert _resolve(tokenizer=thinker).thinking == ("<think>", "</think>")
    assert _resolve().thinking is None


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("<think>\nwhy\n</think>\n\nanswer", Reply(thinking="why", answer="answer", is_closed=True)),
        ("why\n</think>answer", Reply(thinking="why", answer="answer", is_closed=True)),
        ("<think>never ends", Reply(thinking="never ends", answer="", is_closed=False)),
        ("plain answer", Reply(thinking="", answer="plain answer", is_closed=True)),
    ],
)
def test_thoughts_are_separated_from_the_answer(text: str, reply: Reply) -> None:
    """R-038: an unclosed block is its own case, not an answer."""
    assert _resolve(tokenizer=load(byte_level_file(plain=["<think>", "</think>"]))).split_thinking(text) == reply


def test_contract_survives_storage() -> None:
    contract = _ore()
    assert GenerationContract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@pytest.mark.parametrize("change", [{"stop": []}, {"stop": [{"id": "x"}]}, {"more": 1}, {"thinking": ["a"]}])
def test_malformed_stored_contract_is_a_typed_error(change: dict[str, Any]) -> None:
    with pytest.raises(BadModelConfig, match="contract|stop token"):
        GenerationContract.from_dict(_ore().to_dict() | change)
