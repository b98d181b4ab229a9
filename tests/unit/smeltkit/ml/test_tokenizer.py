"""The tokenizer spells every byte, agrees with the reference library, and refuses files that could not."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_files import added_tokens, bpe_model, byte_fallback_file, byte_level_file, load

from smeltkit import limits
from smeltkit.errors import BadRequest, BadTokenizer
from smeltkit.ml.tokenizer import Detokenizer, Tokenizer

ORE = Tokenizer.from_file(Path(__file__).parents[4] / "examples/models/ore-11m/tokenizer.json")
BYTES = load(byte_level_file())
SPM = load(byte_fallback_file())
CODE = "def f(x: int):\n\tif x:\r\n\t\treturn 'h\u00e9 \u20ac \U0001f600'\n\n\n    \t  # \u4e2d\u6587  \n\x00\x0c"


@pytest.mark.parametrize("tokenizer", [ORE, BYTES, SPM])
def test_code_with_tabs_and_unicode_round_trips_byte_for_byte(tokenizer: Tokenizer) -> None:
    """R-079."""
    assert tokenizer.decode(tokenizer.encode(CODE)).encode() == CODE.encode()


def test_python_corpus_round_trips_byte_for_byte() -> None:
    """R-079, on every Python file of the library."""
    for path in sorted(Path(limits.__file__).parent.rglob("*.py")):
        text = path.read_text()
        assert ORE.decode(ORE.encode(text)) == text, path.name


def test_texts_encoded_together_have_the_ids_of_each_alone() -> None:
    """Also an empty one; nothing is padded or cut."""
    texts = [path.read_text() for path in sorted(Path(limits.__file__).parent.glob("*.py"))] + ["", CODE]
    assert ORE.encode_each(texts) == [ORE.encode(text) for text in texts]
    assert SPM.encode_each(texts[-2:]) == [SPM.encode(text) for text in texts[-2:]]


@given(st.text(max_size=200))
def test_any_text_round_trips_up_to_the_normal_form_of_the_file(text: str) -> None:
    """R-079."""
    assert BYTES.decode(BYTES.encode(text)) == text
    assert ORE.decode(ORE.encode(text)) == unicodedata.normalize("NFC", text)


@given(st.text(max_size=60))
def test_byte_fallback_round_trips_any_text(text: str) -> None:
    """R-079; the word mark itself is the one character that this family cannot tell from a space."""
    text = text.replace("\u2581", "")
    assert SPM.decode(SPM.encode(text)) == text


@given(st.text(max_size=120))
def test_ids_are_those_of_the_reference_library(text: str) -> None:
    import tokenizers

    reference = tokenizers.Tokenizer.from_str(json.dumps(byte_fallback_file()))
    assert SPM.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_special_tokens_written_in_text_are_recognised_and_none_is_added() -> None:
    assert ORE.encode("<|im_end|>") == [8188]
    assert ORE.encode("") == []
    assert SPM.encode("x")[0] != 1
    assert SPM.leading_ids() == [1]
    assert ORE.leading_ids() == []


def test_token_bytes_of_both_families_are_raw_bytes() -> None:
    assert BYTES.token_bytes(0xE2) == b"\xe2"
    assert SPM.token_bytes(3 + 0xE2) == b"\xe2"
    assert SPM.token_bytes(266) == b" def"
    assert ORE.token_bytes(8188) == b"<|im_end|>"


@pytest.mark.parametrize("id", [-1, 8192, 10**12])
def test_unknown_id_names_the_range(id: int) -> None:
    with pytest.raises(BadTokenizer, match="ids run from 0 to 8191"):
        ORE.token_bytes(id)


@given(st.text(max_size=80))
def test_stream_of_ids_gives_the_same_text_in_whole_characters(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(id) for id in text.encode()]
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert "".join(pieces) + detokenizer.flush() == text


def test_half_a_character_is_held_back_and_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_control_tokens_are_no_text_in_a_stream() -> None:
    assert Detokenizer(ORE).push(8188) == ""
    assert ORE.decode([8188]) == "<|im_end|>"
    assert ORE.decode([8188], skip_special=True) == ""


def test_lone_surrogate_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        ORE.encode("\ud800")


def test_tokenizer_of_a_larger_vocabulary_than_the_model_is_refused() -> None:
    ORE.check_fits(8192)
    with pytest.raises(BadTokenizer, match="ids reach 8191, but the model has 8000 rows"):
        ORE.check_fits(8000)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    """R-035: a tokenizer never shortens its input in silence."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert load(byte_level_file(truncation=cut)).encode("abcd") == list(b"abcd")


def _without(file: dict[str, Any], token: str) -> dict[str, Any]:
    del file["model"]["vocab"][token]
    return file


BROKEN = {
    "no JSON": b"\x00\x01",
    "deep nesting": b"[" * 100_000,
    "no object": b"[]",
    "no model": b"{}",
    "merge out of vocabulary": byte_level_file(model=bpe_model({"a": 0}, [["a", "b"]])),
    "negative id": byte_level_file(added_tokens=added_tokens(-1, ["x"])),
    "endless ids": byte_level_file(model=bpe_model({"a": 2**32 - 1}, [])),
    "word pieces": byte_level_file(
        decoder=None,
        model={
            "type": "WordPiece",
            "unk_token": "a",
            "vocab": {"a": 0},
            "max_input_chars_per_word": 9,
            "continuing_subword_prefix": "##",
        },
    ),
    "bad regular expression": byte_level_file(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "((("}, "invert": False, "behavior": "Isolated"}
    ),
    "library panics": byte_level_file(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "byte missing": _without(byte_level_file(), "a"),
    "fallback byte missing": _without(byte_fallback_file(), "<0x09>"),
    "empty vocabulary": byte_level_file(model=bpe_model({}, []), added_tokens=[]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_a_typed_error_that_names_it(name: str) -> None:
    content = BROKEN[name]
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(BadTokenizer, match=r"mine\.json"):
        Tokenizer(data, name="mine.json")


def test_oversize_and_missing_files_are_typed_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOKENIZER_MAX_BYTES", 100)
    large = tmp_path / "tokenizer.json"
    large.write_text(json.dumps(byte_level_file()))
    with pytest.raises(BadTokenizer, match="larger than 100 bytes"):
        Tokenizer.from_file(large)
    with pytest.raises(BadTokenizer, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json")


@given(st.binary(max_size=300))
def test_random_bytes_never_escape_the_error_tree(data: bytes) -> None:
    with pytest.raises(BadTokenizer):
        Tokenizer(data)
