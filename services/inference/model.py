"""A loaded bundle: text or chat in, completions out. Knows tokenizer, template and contract; the engine knows none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.inference.config import InferenceConfig
from services.inference.engine import Engine
from services.inference.language import Language, Prompt
from services.inference.llama import LlamaConfig, LlamaEngine
from services.inference.runtime import Generation, Runtime, Scoring
from services.inference.scheduler import Bounds, Scheduler
from services.inference.scheduler import Sequence as Work
from services.inference.sizing import Sizing
from services.inference.stream import StopRule, TokenStream
from smeltkit import limits
from smeltkit.errors import BadRequest, BadSampling, PromptTooLong
from smeltkit.ml.sampling import Sampler, SamplingParams


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How one completion is asked for."""

    sampling: SamplingParams
    """How tokens are chosen."""
    max_tokens: int = 0
    """Tokens at most; 0 for all that the context holds."""
    stop: tuple[str, ...] = ()
    """Stop strings beside the bundle's stop tokens."""
    logprobs: int = -1
    """-1 none, 0 of the chosen token, else also of the best n."""
    truncate_prompt: bool = False
    """Whether the oldest tokens of a prompt that is too long are dropped."""
    ignore_stop: bool = False
    """Whether stop tokens are passed through."""
    final_only: bool = False
    """Whether the completion comes as one piece at its end."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise BadRequest(f"max_tokens={self.max_tokens} must be 1 or more, or 0 for all that the context holds")
        if not -1 <= self.logprobs <= limits.TOP_LOGPROBS_MAX:
            allowed = f"-1 (none) to {limits.TOP_LOGPROBS_MAX}"
            raise BadSampling(f"logprobs={self.logprobs} is out of range; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion that was started, and what is in force for it."""

    generation: Generation
    prompt_tokens: int
    dropped_tokens: int
    max_tokens: int
    stop_ids: tuple[int, ...]


class Model:
    """One bundle on one engine. Made on the event loop that reads its results."""

    def __init__(self, language: Language, engine: Engine, settings: InferenceConfig) -> None:
        """`engine` belongs to the model from now on; BadTokenizer if its vocabulary is smaller than the tokenizer's."""
        language.tokenizer.check_fits(engine.info.vocab_size)
        self.language = language
        self.info = engine.info
        self.context_tokens = min(language.contract.context_tokens, engine.info.slot_cells)
        bounds = Bounds(
            slots=engine.info.slots,
            cells=engine.info.cells,
            slot_cells=engine.info.slot_cells,
            batch_rows=engine.info.batch_rows,
            output_rows=engine.info.output_rows,
            rows_floor=engine.info.rows_floor,
            waiting_max=settings.waiting_max,
        )
        vocab_size = language.tokenizer.vocab_size
        self.runtime = Runtime(
            engine,
            Scheduler(bounds),
            vocab_size=vocab_size,
            flush_s=settings.flush_ms / 1000,
            step_s=settings.step_ms / 1000,
        )

    def generate(self, prompt: Prompt, options: GenerateOptions) -> Completion:
        """Starts a completion. PromptTooLong unless prompt and `max_tokens` fit the context, or may be cut to fit."""
        ids, max_tokens = self._fit(prompt.ids, options)
        stop_ids = () if options.ignore_stop else self.language.contract.stop_ids
        rule = StopRule(max_tokens=max_tokens, ids=frozenset(stop_ids), strings=options.stop)
        generation = Generation(
            Work(ids, len(ids) + max_tokens),
            TokenStream(self.language.tokenizer, rule),
            Sampler(options.sampling, seen=ids),
            logprobs=options.logprobs,
            final_only=options.final_only,
        )
        completion = Completion(
            generation=generation,
            prompt_tokens=len(ids),
            dropped_tokens=len(prompt.ids) - len(ids),
            max_tokens=max_tokens,
            stop_ids=stop_ids,
        )
        self.runtime.submit(generation)
        return completion

    def score(self, prompt: Prompt) -> Scoring:
        """Starts scoring; PromptTooLong if the text does not fit the context."""
        if not 1 <= len(prompt.ids) <= self.context_tokens:
            raise PromptTooLong(f"{len(prompt.ids)} tokens to score; this model takes 1 to {self.context_tokens}")
        scoring = Scoring(Work(list(prompt.ids), len(prompt.ids), all_outputs=True))
        self.runtime.submit(scoring)
        return scoring

    def _fit(self, ids: list[int], options: GenerateOptions) -> tuple[list[int], int]:
        """Prompt ids and limit of new tokens that together fit the context."""
        room = self.context_tokens - (options.max_tokens or 1)
        if not ids:
            raise BadRequest("the prompt is empty; this model needs at least one token to continue")
        if room < 1 or (len(ids) > room and not options.truncate_prompt):
            raise PromptTooLong(
                f"{len(ids)} prompt tokens and {options.max_tokens or 1} new ones exceed the context of "
                f"{self.context_tokens} tokens; shorten the prompt, lower max_tokens or set truncate_prompt"
            )
        kept = ids[max(0, len(ids) - room) :]
        return kept, options.max_tokens or self.context_tokens - len(kept)


def open_engine(weights: Path, sizing: Sizing, settings: InferenceConfig) -> LlamaEngine:
    """The engine on the GGUF file `weights`; blocks while it loads."""
    config = LlamaConfig(
        slots=settings.slots,
        cells=sizing.cells,
        is_split=sizing.is_split,
        batch_rows=settings.batch_rows,
        output_rows=sizing.output_rows,
        threads=settings.thread_count,
        is_upstream=settings.is_upstream,
    )
    return LlamaEngine(weights, config)
