"""Text to token ids and back, on the `tokenizers` package: the reference implementation, never a copy of it.

Two families are taken, since only they can spell every byte: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece
style vocabularies with byte fallback (Llama 2, Phi 3). A token is a byte string here, and text is made from bytes at
the very end; so a character split over tokens is never shown in halves, and tabs, carriage returns and indentation
survive. A normalizer in the file (Qwen's NFC) is part of the model's contract: text in NFC round-trips byte for byte.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import tokenizers

from smeltkit import limits
from smeltkit.errors import BadRequest, BadTokenizer

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START: Final = "\u2581"


class Tokenizer:
    """A loaded tokenizer.json. Immutable, so threads may share it."""

    def __init__(self, data: bytes, *, name: str = "tokenizer.json") -> None:
        """Loads the bytes of a tokenizer.json; BadTokenizer names the file `name` and what is wrong with it."""
        self.name = name
        declared = _parse(data, name)
        with _library_errors(name, "is malformed"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.special_ids: Final = frozenset(id for id, token in added.items() if token.special)
        """Ids of control tokens: recognised in prompts, never part of generated text."""
        self._is_byte_level = _has_component(declared.get("decoder"), "ByteLevel")
        if not self._is_byte_level and not declared["model"].get("byte_fallback"):
            raise BadTokenizer(
                f"{name}: a {declared['model'].get('type')} vocabulary with neither byte level nor byte"
                " fallback cannot spell every text; use the model's own fast tokenizer.json"
            )
        self.vocab_size: Final = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest token id; a model may pad its embedding beyond."""
        if not 0 < self.vocab_size <= limits.VOCAB_MAX:
            raise BadTokenizer(f"{name}: highest id {self.vocab_size - 1} is not within 0 to {limits.VOCAB_MAX - 1}")
        self._check_spells_every_byte()
        self._bytes: dict[int, bytes] = {}
        self._drops_first_space = self.token_bytes(self.encode("a")[0]).startswith(b" ")

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """The tokenizer stored at `path`; BadTokenizer if it is missing, too large or malformed."""
        try:
            with path.open("rb") as file:
                data = file.read(limits.TOKENIZER_MAX_BYTES + 1)
        except OSError as error:
            raise BadTokenizer(f"{path.name} cannot be read: {error.strerror}") from error
        return cls(data, name=path.name)

    def check_fits(self, vocab_size: int) -> None:
        """Raises BadTokenizer if some token id has no row in an embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise BadTokenizer(
                f"{self.name}: token ids reach {self.vocab_size - 1}, but the model has {vocab_size}"
                " rows; this tokenizer belongs to another model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in the text are recognised; none is added."""
        return self._encode(text, add_special_tokens=False)

    def encode_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as `encode` gives them, on as many cores as RAYON_NUM_THREADS allows, or all."""
        with _library_errors(self.name, "cannot encode a text"):
            return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of a whole sequence, the inverse of `encode`; bytes that are no UTF-8 become U+FFFD."""
        kept = [id for id in ids if not (skip_special and id in self.special_ids)]
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")
        return text[1:] if self._drops_first_space and text.startswith(" ") and kept[0] not in self._added else text

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for; BadTokenizer if there is no such token."""
        if id not in self._bytes:
            self._bytes[id] = self._spell(id)
        return self._bytes[id]

    def token_id(self, text: str) -> int | None:
        """The id of the token written `text`, or None."""
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def is_added(self, id: int) -> bool:
        """Whether `id` is an added token: matched as a whole in text, not built by merges."""
        return id in self._added

    def leading_ids(self) -> list[int]:
        """Ids that the file's own post-processor puts before a text: usually none, or the beginning of sequence."""
        plain, with_added = self.encode("a"), self._encode("a", add_special_tokens=True)
        start = next((i for i in range(len(with_added)) if with_added[i : i + len(plain)] == plain), 0)
        return with_added[:start]

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with _library_errors(self.name, "cannot encode a text"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def _check_spells_every_byte(self) -> None:
        """Without a token for some byte the library would drop it from the text in silence."""
        spellings = {byte: character for character, byte in _BYTE_OF.items()}
        for byte in _UTF8_BYTES:
            spelling = spellings[byte] if self._is_byte_level else f"<0x{byte:02X}>"
            if self.token_id(spelling) is None:
                raise BadTokenizer(f"{self.name}: no token spells the byte 0x{byte:02X}; code with it would be altered")

    def _spell(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._tokenizer.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise BadTokenizer(f"{self.name}: no token has id {id}; ids run from 0 to {self.vocab_size - 1}")
        if self._is_byte_level:
            values = [_BYTE_OF.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(_WORD_START, " ").encode()


class Detokenizer:
    """Turns a stream of ids into text: constant work a token, and only whole characters come out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that is complete with token `id`; empty while a character lacks bytes, and for control tokens."""
        return "" if id in self._tokenizer.special_ids else self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._decoder.decode(b"", final=True)


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > limits.TOKENIZER_MAX_BYTES:
        raise BadTokenizer(f"{name} is larger than {limits.TOKENIZER_MAX_BYTES} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadTokenizer(f"{name} is no JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise BadTokenizer(f"{name} has no model; save the tokenizer as a fast tokenizer.json")
    return value


@contextmanager
def _library_errors(name: str, action: str) -> Iterator[None]:
    """Wraps what the library raises in BadTokenizer; its Rust code panics on some files: that is no Exception."""
    try:
        yield
    except (TypeError, UnicodeError) as error:
        raise BadRequest("text holds half a surrogate pair and so is no Unicode text; repair its encoding") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadTokenizer(f"{name} {action}: {error}") from error


def _has_component(component: Any, kind: str) -> bool:
    """Whether a decoder is, or is a sequence that holds, a component of type `kind`."""
    if not isinstance(component, dict):
        return False
    parts = component.get("decoders")
    return component.get("type") == kind or (isinstance(parts, list) and any(_has_component(p, kind) for p in parts))


def _byte_alphabet() -> dict[str, int]:
    """Character to byte of byte-level BPE (GPT-2): printable Latin-1 is itself, other bytes are U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF: Final = _byte_alphabet()
_UTF8_BYTES: Final = tuple(byte for byte in range(0xF5) if byte not in (0xC0, 0xC1))
