"""What a bundle's small files say about text: tokenizer, chat template, generation contract. No weights, no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smeltkit.errors import BadRequest, UnsupportedOption
from smeltkit.ml.chat import ChatTemplate
from smeltkit.ml.contract import GenerationContract
from smeltkit.ml.model_files import read_json, template_of
from smeltkit.ml.tokenizer import Tokenizer

RAW_TEXT_WARNING = (
    "this is a chat model and got raw text: it was trained on its chat format and may not stop; send messages instead"
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it."""

    ids: list[int]
    """Token ids."""
    text: str = ""
    """What was encoded; empty where ids were given."""
    warnings: tuple[str, ...] = ()
    """What the caller should know, e.g. that a chat model got raw text."""


class Language:
    """A bundle's text side. Immutable, so threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Reads the bundle's files in `folder`; the error of whatever is missing or broken."""
        self.contract = GenerationContract.from_dict(read_json(folder / "contract.json"))
        self.tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        source = template_of(folder)
        texts = self.contract.bos_text, self.contract.eos_text
        self.template = ChatTemplate(source, *texts) if source else None

    def encode_text(self, text: str) -> Prompt:
        """Raw text, with the beginning-of-sequence token where the contract adds it."""
        ids = self.tokenizer.encode(text)
        if self.contract.add_bos and self.contract.bos_id is not None:
            ids = [self.contract.bos_id, *ids]
        is_chat = self.contract.task == "chat"
        return Prompt(ids=ids, text=text, warnings=(RAW_TEXT_WARNING,) if is_chat else ())

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """A chat in the bundle's template; UnsupportedOption if it has none."""
        if self.template is None:
            raise UnsupportedOption("this model has no chat template: it completes text; send a text prompt instead")
        text = self.template.render(messages)
        return Prompt(ids=self.tokenizer.encode(text), text=text)

    def check_ids(self, ids: Sequence[int]) -> Prompt:
        """Token ids as they are; BadRequest if one is not in the vocabulary."""
        size = self.tokenizer.vocab_size
        bad = next((id for id in ids if not 0 <= id < size), None)
        if bad is not None:
            raise BadRequest(f"token id {bad} is not in the vocabulary; ids run from 0 to {size - 1}")
        return Prompt(ids=list(ids))
