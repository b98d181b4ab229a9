"""From tokens to what a client reads: whole characters, stop tokens and stop strings, a finish reason always."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from smeltkit import limits
from smeltkit.errors import BadRequest
from smeltkit.ml.tokenizer import Detokenizer, Tokenizer


class Finish(Enum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Detail:
    """Log-probabilities at one position: of the token chosen, and the most likely ones, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Piece:
    """A part of a completion. Pieces add up: a reader that is slow gets fewer and larger ones."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    details: list[Detail] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, later: Piece) -> None:
        """Puts `later` behind this piece."""
        self.text += later.text
        self.ids += later.ids
        self.details += later.details
        self.finish = later.finish


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a completion ends."""

    max_tokens: int
    """Tokens generated at most, the stop token included."""
    ids: frozenset[int] = frozenset()
    """Tokens that end it; the one that does is counted and reported, but is no text."""
    strings: tuple[str, ...] = ()
    """Texts that end it; they and what follows are not part of its text."""

    def __post_init__(self) -> None:
        if len(self.strings) > limits.STOP_STRINGS_MAX:
            raise BadRequest(f"{len(self.strings)} stop strings; at most {limits.STOP_STRINGS_MAX} are allowed")
        for text in self.strings:
            if not 0 < len(text) <= limits.STOP_STRING_MAX_CHARS:
                allowed = f"1 to {limits.STOP_STRING_MAX_CHARS} are allowed"
                raise BadRequest(f"a stop string has {len(text)} characters; {allowed}")


class TokenStream:
    """One completion as it grows."""

    def __init__(self, tokenizer: Tokenizer, rule: StopRule) -> None:
        self.count = 0
        """Tokens generated so far."""
        self.finish: Finish | None = None
        """Why it ended, once it has."""
        self._rule = rule
        self._detokenizer = Detokenizer(tokenizer)
        self._piece = Piece()
        self._held = ""
        """Text not yet given out because a stop string may begin in it."""
        self._beginnings = {text[:end] for text in rule.strings for end in range(1, len(text))}
        self._longest = max(map(len, rule.strings), default=0)

    @property
    def pending(self) -> int:
        """Tokens that `take` would give out."""
        return len(self._piece.ids)

    def push(self, token: int, detail: Detail | None = None) -> None:
        """Adds a token; `finish` is set if it was the last one."""
        self.count += 1
        self._piece.ids.append(token)
        if detail is not None:
            self._piece.details.append(detail)
        if token in self._rule.ids:
            self.end(Finish.STOP)
            return
        self._add_text(self._detokenizer.push(token))
        if self.finish is None and self.count >= self._rule.max_tokens:
            self.end(Finish.LENGTH)

    def end(self, finish: Finish) -> None:
        """Ends the completion; text held back so far comes out."""
        if self.finish is None:
            self._add_text(self._detokenizer.flush())
        if self.finish is None:
            self._piece.text += self._held
            self.finish = finish

    def take(self) -> Piece:
        """What is new since the last call; the finish reason once the completion has ended."""
        piece, self._piece = self._piece, Piece()
        piece.finish = self.finish
        return piece

    def _add_text(self, text: str) -> None:
        if not self._longest:
            self._piece.text += text
            return
        text = self._held + text
        cuts = [found for stop in self._rule.strings if (found := text.find(stop)) >= 0]
        if cuts:
            self._piece.text += text[: min(cuts)]
            self._held, self.finish = "", Finish.STOP
            return
        held = _longest_suffix_in(self._beginnings, text, self._longest - 1)
        self._held = text[len(text) - held :]
        self._piece.text += text[: len(text) - held]


def _longest_suffix_in(texts: set[str], text: str, longest: int) -> int:
    """Length of the longest end of `text`, up to `longest` characters, that is one of `texts`; 0 if none is."""
    return next((size for size in range(min(longest, len(text)), 0, -1) if text[-size:] in texts), 0)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text by itself; bytes that are no whole character are replaced."""
    return [tokenizer.token_bytes(id).decode("utf-8", errors="replace") for id in ids]
