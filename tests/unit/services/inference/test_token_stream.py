"""Text from tokens: whole characters, stop tokens, stop strings, and why it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.stream import Detail, Finish, Piece, StopRule, TokenStream
from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.ml.tokenizer import Tokenizer
from smeltkit.testing.tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


def feed(tokenizer: Tokenizer, text: str, rule: StopRule) -> tuple[Piece, list[Piece]]:
    """Pushes the text's tokens one by one and takes a piece after each, until it ends; the sum and the pieces."""
    stream, pieces = TokenStream(tokenizer, rule), []
    for token in tokenizer.encode(text):
        stream.push(token)
        pieces.append(stream.take())
        if stream.finish is not None:
            break
    else:
        stream.end(Finish.CANCELLED)
        pieces.append(stream.take())
    whole = Piece()
    for piece in pieces:
        whole.add(piece)
    return whole, pieces


def test_a_completion_that_reaches_its_limit_says_length(tokenizer: Tokenizer) -> None:
    """R-034: the reason is there however a completion ends."""
    whole, _ = feed(tokenizer, "one two three four five", StopRule(max_tokens=3))
    assert whole.finish is Finish.LENGTH
    assert len(whole.ids) == 3


def test_a_stop_token_ends_it_and_is_counted_but_is_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    whole, _ = feed(tokenizer, "done<|im_end|>more", StopRule(max_tokens=99, ids=frozenset({end})))
    assert whole.finish is Finish.STOP
    assert whole.text == "done"
    assert whole.ids[-1] == end


def test_a_stop_token_that_is_ignored_leaves_no_text_and_goes_on(tokenizer: Tokenizer) -> None:
    whole, _ = feed(tokenizer, "done<|im_end|>more", StopRule(max_tokens=99))
    assert whole.text == "donemore"


def test_a_stop_string_over_several_tokens_is_cut_off_with_what_follows(tokenizer: Tokenizer) -> None:
    whole, _ = feed(tokenizer, "def f():\n    return 1\n\nclass A:", StopRule(max_tokens=99, strings=("\n\nclass",)))
    assert whole.text == "def f():\n    return 1"
    assert whole.finish is Finish.STOP


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    whole, _ = feed(tokenizer, "alpha beta gamma", StopRule(max_tokens=99, strings=("gamma", "beta")))
    assert whole.text == "alpha "


def test_text_that_only_begins_like_a_stop_string_comes_out_in_the_end(tokenizer: Tokenizer) -> None:
    whole, _ = feed(tokenizer, "value\n\ncl", StopRule(max_tokens=99, strings=("\n\nclass",)))
    assert whole.text == "value\n\ncl"


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    whole, pieces = feed(tokenizer, "a\U0001f40db", StopRule(max_tokens=99))
    assert whole.text == "a\U0001f40db"
    assert all("\ufffd" not in piece.text for piece in pieces)


def test_a_character_that_is_never_finished_is_replaced(tokenizer: Tokenizer) -> None:
    whole, _ = feed(tokenizer, "a\U0001f40d", StopRule(max_tokens=len(tokenizer.encode("a\U0001f40d")) - 1))
    assert whole.text == "a\ufffd"


def test_details_travel_with_their_tokens(tokenizer: Tokenizer) -> None:
    stream = TokenStream(tokenizer, StopRule(max_tokens=9))
    stream.push(5, Detail(5, -0.5))
    assert stream.take().details == [Detail(5, -0.5)]
    assert stream.take() == Piece()


@given(st.text("ab\n \u00e9", max_size=30), st.lists(st.text("ab\n\u00e9", min_size=1, max_size=4), max_size=3))
def test_the_text_is_what_stands_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    tokenizer = _shared_tokenizer()
    whole, pieces = feed(tokenizer, text, StopRule(max_tokens=999, strings=tuple(stops)))
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert whole.text == text[: min(found, default=len(text))]
    assert all(piece.finish is None for piece in pieces[:-1])


@pytest.mark.parametrize("strings", [("",), ("x" * (limits.STOP_STRING_MAX_CHARS + 1),), ("x",) * 17])
def test_absurd_stop_strings_are_refused(strings: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest, match="stop string"):
        StopRule(max_tokens=1, strings=strings)


_TOKENIZERS: list[Tokenizer] = []


def _shared_tokenizer() -> Tokenizer:
    """One tokenizer for all of hypothesis' examples, which may not use fixtures of a narrower scope."""
    if not _TOKENIZERS:
        folder = Path(__file__).resolve().parents[4] / "examples" / "models" / "ore-11m"
        _TOKENIZERS.append(Tokenizer.from_file(folder / "tokenizer.json"))
    return _TOKENIZERS[0]
