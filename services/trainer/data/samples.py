"""Rows become token ids and targets, through the tokenizer and the chat template that the bundle is served with.

    {"messages": [{"role": ..., "content": ...}, ...]}    every answer is learnt, with the stop token that ends it
    {"text": ...}                                         every token is learnt, with a stop token at the end
    {"ids": [...]}                                        as they are, every one but the first is learnt

What is learnt is decoded again and compared with the answer, row by row: a mask that is off by one token teaches the
model to forget its stop token, and no loss curve shows it. Keys beside these are not read.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from services.trainer.data.refusals import listed
from services.trainer.data.rows import COLUMNS, Row
from smeltkit.errors import BadDataset, BadRequest
from smeltkit.ids import digest_bytes
from smeltkit.ml.chat import ChatTemplate
from smeltkit.ml.contract import GenerationContract
from smeltkit.ml.decoder_targets import IGNORED
from smeltkit.ml.model_files import template_of
from smeltkit.ml.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
_ROLES: Final = ("system", "user", "assistant", "tool")
"""Of whom a message can be, beside those that the chat template compares a role with."""
_COMPARED_ROLE: Final = re.compile(r"""\brole['")\]]*\s*==\s*['"](\w+)['"]""")
_HOLDS: Final[Mapping[str, tuple[type[Any], str]]] = {
    "messages": (list, "a list of messages"),
    "text": (str, "text"),
    "ids": (list, "a list of token ids"),
}
"""Key of a row to what it holds."""
_BATCH_ROWS: Final = 256
_BATCH_CHARACTERS: Final = 1 << 20
"""Rows, and characters of texts among them, that are encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row, tokenized."""

    ids: Tokens
    """Token ids [T]."""
    targets: Tokens
    """For each token the next one, or IGNORED where that is not to be learnt [T]."""

    @property
    def counted(self) -> int:
        """Targets that are learnt."""
        return int((self.targets != IGNORED).sum())


class SampleSequence(Sequence[Sample]):
    """Samples by their numbers; what knows its length and gives a `sample`."""

    def sample(self, number: int) -> Sample:
        """The sample of a number, which is one that there is."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.sample(number) for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.sample(index)


class Encoder:
    """Turns rows into samples for one bundle."""

    def __init__(self, folder: Path, contract: GenerationContract, *, ids_of: str = "") -> None:
        """Reads tokenizer and template of the bundle in `folder`; BadTokenizer, BadTemplate.

        `ids_of` is the digest of the tokenizer that made ids in rows, if any holds them; BadDataset if another did.
        """
        path = folder / "tokenizer.json"
        self.tokenizer, self._has_ids = Tokenizer.from_file(path), bool(ids_of)
        self._digest = digest_bytes(path.read_bytes())
        if ids_of and ids_of != self._digest:
            raise BadDataset(f"the ids are of the tokenizer {ids_of}, the base has {self._digest}; tokenize them anew")
        source = template_of(folder)
        self._template = ChatTemplate(source, contract.bos_text, contract.eos_text) if source else None
        self._roles = tuple(dict.fromkeys([*_ROLES, *_COMPARED_ROLE.findall(source or "")]))
        self._contract = contract
        end = self.tokenizer.token_id(contract.eos_text) if contract.eos_text else None
        self._text_end = end if end is not None else contract.stop_ids[0]

    def encode_all(self, rows: Iterable[Row], name: str) -> Iterator[tuple[int, Mapping[str, Any], Sample]]:
        """Number, row and sample of each row of the file `name`, as `encode` gives it; texts on all cores."""
        for batch in _batches(rows):
            encoded = iter(self.tokenizer.encode_each([row["text"] for _, row in batch if _is_text(row)]))
            for number, row in batch:
                where = f"{name} row {number}"
                yield number, row, self.text(next(encoded), where) if _is_text(row) else self.encode(row, where)

    def encode(self, row: Mapping[str, Any], where: str) -> Sample:
        """The sample of a row; BadDataset, naming `where`, for a row that is malformed or holds nothing to learn."""
        kinds = [key for key in COLUMNS if key in row]
        if len(kinds) != 1:
            raise BadDataset(
                f"{where} has the keys {listed(list(row))}; exactly one of {', '.join(COLUMNS)} is needed, or"
                " columns, which name others"
            )
        value: Any = row[kinds[0]]
        wanted, told = _HOLDS[kinds[0]]
        if not isinstance(value, wanted):
            raise BadDataset(f"{where}: {kinds[0]} is {reprlib.repr(value)}, it must be {told}")
        if kinds[0] == "text":
            return self.text(self.tokenizer.encode(value), where)
        return self._conversation(value, where) if kinds[0] == "messages" else self._given(value, where)

    def text(self, ids: Sequence[int], where: str) -> Sample:
        """The sample of a text's ids, between the tokens that begin and end one."""
        begin = [self._contract.bos_id] if self._contract.add_bos and self._contract.bos_id is not None else []
        whole = [*begin, *ids, self._text_end]
        return _sample([(whole[:1], False), (whole[1:], True)], where)

    def preview(self, sample: Sample) -> str:
        """The sample as text, with what is learnt between double angle brackets."""
        text, is_open = "", False
        learnt = np.concatenate([[False], sample.targets[:-1] != IGNORED])
        for id, is_learnt in zip(sample.ids.tolist(), learnt.tolist(), strict=True):
            text += ("<<" if is_learnt else ">>") if is_learnt != is_open else ""
            text, is_open = text + self.tokenizer.token_bytes(id).decode(errors="replace"), is_learnt
        return text + (">>" if is_open else "")

    def _given(self, ids: list[Any], where: str) -> Sample:
        if not self._has_ids:
            raise BadDataset(
                f"{where} holds ids, but nothing says of which tokenizer; the base's is ids_of: {self._digest}"
            )
        size = self.tokenizer.vocab_size
        wrong = next((id for id in ids if type(id) is not int or not 0 <= id < size), None)
        if wrong is not None:
            raise BadDataset(f"{where} holds the id {wrong!r}; ids are whole numbers from 0 to below {size}")
        return _sample([(ids[:1], False), (ids[1:], True)], where)

    def _conversation(self, messages: Sequence[Any], where: str) -> Sample:
        if self._template is None:
            raise BadDataset(f"{where} is a conversation, but the bundle has no chat template; train on text rows")
        if not messages:
            raise BadDataset(f"{where} holds no message")
        for number, message in enumerate(messages, start=1):
            if not _is_message(message):
                found = reprlib.repr(message)
                raise BadDataset(
                    f"{where}: message {number} is {found}; it needs a role and a content alone, both text"
                )
        unknown = next((message["role"] for message in messages if message["role"] not in self._roles), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, self._roles, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise BadDataset(f"{where} has a message of the role {unknown!r}; roles are {', '.join(self._roles)}{hint}")
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise BadDataset(f"{where} has no message of the assistant, so there is nothing to learn")
        parts: list[tuple[list[int], bool]] = []
        seen = ""
        for index in answers:
            prompt, answer = self._turn(messages[: index + 1], where)
            if not prompt.startswith(seen):  # the template rewrites earlier turns; then only this answer is certain
                parts, seen = [], ""
            ids = self._answer_ids(answer, messages[index]["content"], where)
            parts += [(self.tokenizer.encode(prompt[len(seen) :]), False), (ids, True)]
            seen = prompt + self.tokenizer.decode(ids)
        return _sample(parts, where)

    def _turn(self, messages: Sequence[Mapping[str, str]], where: str) -> tuple[str, str]:
        """Prompt of the last message as it is served, and what the template writes after it."""
        assert self._template is not None
        try:
            prompt = self._template.render(messages[:-1], add_generation_prompt=True)
            whole = self._template.render(messages, add_generation_prompt=False)
        except BadRequest as error:
            raise BadDataset(f"{where}: {error.message}") from error
        if not whole.startswith(prompt):
            raise BadDataset(f"{where}: the chat template does not put the answer where it asks for it when serving")
        return prompt, whole[len(prompt) :]

    def _answer_ids(self, rendered: str, content: str, where: str) -> list[int]:
        """Ids of an answer up to its stop token, proven by decoding them."""
        ids, stops = self.tokenizer.encode(rendered), set(self._contract.stop_ids)
        end = next((position for position, id in enumerate(ids) if id in stops), None)
        if end is None:
            raise BadDataset(f"{where}: the chat template ends the answer with none of the stop tokens")
        text = self.tokenizer.decode(ids[:end])
        if not text and not content.strip():
            raise BadDataset(f"{where}: the answer is empty")
        if text not in (content, content.strip()) or not text:
            raise BadDataset(f"{where}: what would be learnt is {text[:60]!r}, but the answer is {content[:60]!r}")
        return ids[: end + 1]


def _sample(parts: Sequence[tuple[list[int], bool]], where: str) -> Sample:
    """Parts of a row, each learnt or not, as ids and targets one place on."""
    ids = np.array([id for part, _ in parts for id in part], dtype=np.int32)
    learnt = np.array([is_learnt for part, is_learnt in parts for _ in part])
    if len(ids) < 2 or not learnt[1:].any():
        raise BadDataset(f"{where} holds no token to learn")
    targets = np.full(len(ids), IGNORED, dtype=np.int32)
    targets[:-1] = np.where(learnt[1:], ids[1:], IGNORED)
    return Sample(ids=ids, targets=targets)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists that are bounded in number and in text."""
    batch: list[Row] = []
    size = 0
    for number, row in rows:
        batch.append((number, row))
        size += len(row["text"]) if _is_text(row) else 0
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and [key for key in COLUMNS if key in row] == ["text"]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )
