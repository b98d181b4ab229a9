"""The generation contract: where a model stops, how it starts, how long it may get; resolved once, then only read.

Every way to run a model (server, judge, trainer, exported file) reads this value instead of guessing from four files.
A stop id remembers each place that declared it, so "why did it stop there" has an answer years later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from smeltkit.errors import BadModelConfig, BadTemplate
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.model_files import template_in
from smeltkit.ml.tokenizer import Tokenizer

Task = Literal["chat", "completion"]

STOP_MARKERS: Final = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|EOT|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
"""Tokens that end a text or a turn in the families known; each counts only where it is a special token."""

CHAT_MARKERS: Final = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "[INST]",
    "<|user|>",
    "<\uff5cUser\uff5c>",
)
"""Special tokens that only a chat template would use: with one of them, a missing template is a loss."""

THINKING_MARKERS: Final = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Pairs of tokens around text that the model thinks before it answers."""


@dataclass(frozen=True, kw_only=True)
class GenerationContract:
    """How a bundle generates."""

    stop_ids: tuple[int, ...]
    """Token ids that end a completion, ascending; at least one."""
    stop_sources: Mapping[int, tuple[str, ...]]
    """For each stop id the places that declare it, e.g. `generation_config.json` or `tokenizer marker <|im_end|>`."""
    bos_id: int | None
    """Token that begins a sequence, if the model has one."""
    add_bos: bool
    """Whether a raw text gets `bos_id` in front; a chat template writes its own."""
    pad_id: int | None
    """Padding token; it stops nothing unless declared as a stop."""
    context_tokens: int
    """Prompt and completion together hold at most this many tokens."""
    task: Task
    """`chat` if the bundle has a chat template, else `completion`."""
    thinking: tuple[str, str] | None = None
    """Markers around thinking text, or None for a model that does not think."""
    bos_text: str = ""
    """What a template sees as `bos_token`."""
    eos_text: str = ""
    """What a template sees as `eos_token`."""

    def __post_init__(self) -> None:
        if not self.stop_ids:
            raise BadModelConfig(
                "no stop token is declared, so every completion would run to its limit; set eos_token_id"
                " in generation_config.json"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for a manifest or contract.json."""
        return {
            "stop": [{"id": id, "sources": list(self.stop_sources[id])} for id in self.stop_ids],
            "bos_id": self.bos_id,
            "add_bos": self.add_bos,
            "pad_id": self.pad_id,
            "bos_text": self.bos_text,
            "eos_text": self.eos_text,
            "context_tokens": self.context_tokens,
            "task": self.task,
            "thinking": list(self.thinking) if self.thinking else None,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> GenerationContract:
        """The contract of `to_dict`; BadModelConfig if it is malformed."""
        try:
            fields = dict(value)
            sources = {int(stop["id"]): tuple(map(str, stop["sources"])) for stop in fields.pop("stop")}
            thinking = fields.pop("thinking")
            return cls(
                stop_ids=tuple(sources),
                stop_sources=sources,
                thinking=(str(thinking[0]), str(thinking[1])) if thinking else None,
                **fields,
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BadModelConfig(f"contract.json is malformed: {error!r}; import the model again") from error

    def split_thinking(self, text: str) -> Reply:
        """`text` as thinking and answer, by the contract's markers.

        A template may open the block itself, so a text that begins inside it counts too. `is_closed` is False when the
        budget ended within the block: then there is no answer, and scoring the thoughts as one would be wrong.
        """
        if self.thinking is None:
            return Reply(thinking="", answer=text, is_closed=True)
        begin, end = self.thinking
        thoughts, closed, answer = text.partition(end)
        if closed:
            return Reply(
                thinking=thoughts.replace(begin, "", 1).strip("\n"), answer=answer.lstrip("\n"), is_closed=True
            )
        if begin in text:
            return Reply(thinking=text.replace(begin, "", 1).strip("\n"), answer="", is_closed=False)
        return Reply(thinking="", answer=text, is_closed=True)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A completion of a thinking model, taken apart."""

    thinking: str
    """What stood between the markers."""
    answer: str
    """What came after them."""
    is_closed: bool
    """Whether the thinking block, if any, was ended by the model."""


def resolve_contract(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    tokenizer_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
) -> GenerationContract:
    """The contract that a Hugging Face folder's files declare together.

    `chat_template` is the template's source if it stands in its own file; otherwise tokenizer_config is asked. An empty
    file declares a completion model. BadModelConfig when no stop token is declared or an id lies outside the
    vocabulary; BadTemplate when the tokenizer has chat markers but no template came with it.
    """
    model = ModelConfig.from_hf(config)
    vocab_size = model.vocab_size
    generation = generation_config or {}
    named = {key: tokenizer.token_id(_token_text(tokenizer_config.get(f"{key}_token"))) for key in ("pad", "bos")}
    pad_id, bos_id = (_first_id(id, f"{key}_token_id", (generation, config), vocab_size) for key, id in named.items())
    sources = _stop_sources(config, generation, tokenizer_config, tokenizer, pad_id, vocab_size)
    if chat_template is None:
        chat_template = template_in(tokenizer_config)
    return GenerationContract(
        stop_ids=tuple(sorted(sources)),
        stop_sources={id: tuple(sources[id]) for id in sorted(sources)},
        bos_id=bos_id,
        add_bos=_adds_bos(tokenizer_config, tokenizer, bos_id),
        pad_id=pad_id,
        context_tokens=model.context_tokens,
        task=_task(chat_template, tokenizer),
        thinking=_thinking(tokenizer),
        bos_text=_token_text(tokenizer_config.get("bos_token")),
        eos_text=_token_text(tokenizer_config.get("eos_token")),
    )


def _stop_sources(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tokenizer: Tokenizer,
    pad_id: int | None,
    vocab_size: int,
) -> dict[int, list[str]]:
    """Stop id to the places that declare it. A padding token that merely looks like a marker declares nothing."""
    sources: dict[int, list[str]] = {}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        for id in _ids(value.get("eos_token_id"), f"{name}: eos_token_id", vocab_size):
            sources.setdefault(id, []).append(name)
    eos = tokenizer.token_id(_token_text(tokenizer_config.get("eos_token")))
    if eos is not None:
        sources.setdefault(eos, []).append("tokenizer_config.json")
    for marker in STOP_MARKERS:
        found = tokenizer.token_id(marker)
        if found is not None and found in tokenizer.special_ids and (found != pad_id or found in sources):
            sources.setdefault(found, []).append(f"tokenizer marker {marker}")
    return sources


def _first_id(named: int | None, key: str, places: Sequence[Mapping[str, Any]], vocab_size: int) -> int | None:
    """The id of the token that is named by its text, else the first that one of `places` holds under `key`."""
    if named is not None:
        return named
    return next((id for values in places for id in _ids(values.get(key), key, vocab_size)), None)


def _ids(value: Any, where: str, vocab_size: int) -> list[int]:
    """One id, a list of ids or nothing, checked against the vocabulary."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocab_size:
            raise BadModelConfig(f"{where} holds {id!r}; token ids of this model run from 0 to {vocab_size - 1}")
    return ids


def _token_text(value: Any) -> str:
    """A token given as text or as an object with `content`; empty if there is none."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _adds_bos(tokenizer_config: Mapping[str, Any], tokenizer: Tokenizer, bos_id: int | None) -> bool:
    """What tokenizer_config says, or else what the tokenizer file's own post-processor does."""
    declared = tokenizer_config.get("add_bos_token")
    if isinstance(declared, bool):
        return declared and bos_id is not None
    return bos_id is not None and tokenizer.leading_ids() == [bos_id]


def _task(chat_template: str | None, tokenizer: Tokenizer) -> Task:
    if chat_template is not None:
        return "chat" if chat_template else "completion"
    marker = next((marker for marker in CHAT_MARKERS if tokenizer.token_id(marker) in tokenizer.special_ids), None)
    if marker is not None:
        raise BadTemplate(
            f"chat_template.jinja is missing, but the tokenizer has the chat token {marker}; add the model's"
            " template, or an empty file to declare a completion model"
        )
    return "completion"


def _thinking(tokenizer: Tokenizer) -> tuple[str, str] | None:
    for begin, end in THINKING_MARKERS:
        ids = tokenizer.token_id(begin), tokenizer.token_id(end)
        if all(id is not None and tokenizer.is_added(id) for id in ids):
            return begin, end
    return None
