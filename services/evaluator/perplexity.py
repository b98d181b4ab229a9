"""Perplexity of a text under a model: windows over its tokens, the sum of their log-probabilities, an interval.

    tokens   0 ......................................................... n
    window   |== w ==|            of the first, all but the first token count
    window        |--- w-s ---|== s ==|      of the others the last s; what is before them is context
    window             |--- w-s ---|== s ==|

Token perplexity is exp(-sum / tokens), byte perplexity exp(-sum / bytes): only the latter can be compared between
models with other vocabularies. The interval treats each window's tokens as one observation, since neighbours in a text
belong together: it is that of a ratio of two sums (Cochran 1977, Sampling Techniques, section 6.3).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from services.evaluator.stats import Z_95, Estimate
from services.evaluator.tasks import task_group
from smeltkit import limits
from smeltkit.errors import AbsurdPerplexity, ReportMismatch, TooFewTokens

Scorer = Callable[[Sequence[int]], Awaitable[Sequence[float]]]
"""Natural log-probability of each of the given tokens given those before it; 0 for the first."""
Progress = Callable[[int, int], Awaitable[None]]
"""Called with windows done and windows in all."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one window gave."""

    begin: int
    """Index of its first token in the text."""
    tokens: int
    """Tokens that count: its last ones."""
    nats: float
    """Their negative log-likelihood in nats."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Two perplexities with their 95 % intervals, and the tokens and bytes that they rest on."""

    token: Estimate
    byte: Estimate
    tokens: int
    size_bytes: int


def windows_of(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end and tokens that count of each window over `count` tokens: each token but the first counts once."""
    begin, done = 0, 1
    while done < count:
        end = min(begin + window, count)
        yield begin, end, end - done
        begin, done = begin + stride, end


async def measure(
    score: Scorer, ids: Sequence[int], *, window: int, stride: int, concurrency: int, progress: Progress
) -> list[Window]:
    """Every window of `ids`, `concurrency` at a time. ReportMismatch if a log-probability is missing or not finite."""
    plan = list(windows_of(len(ids), window, stride))
    waiting, found = iter(plan), dict[tuple[int, int], Window]()

    async def work() -> None:
        for begin, end, tokens in waiting:
            logprobs = await score(ids[begin:end])
            counted = logprobs[len(logprobs) - tokens :]
            if len(logprobs) != end - begin or not all(map(math.isfinite, counted)):
                raise ReportMismatch(f"tokens {begin} to {end} have no finite log-probability each; see the engine")
            found[begin, end] = Window(begin=begin, tokens=tokens, nats=-math.fsum(counted))
            await progress(len(found), len(plan))

    async with task_group() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return [found[begin, end] for begin, end, _ in plan]


def perplexity_of(windows: Sequence[Window], size_bytes: int) -> Perplexity:
    """The perplexities of a text of `size_bytes` bytes from its windows; ReportMismatch if there is none."""
    tokens = sum(window.tokens for window in windows)
    if not tokens or size_bytes < 1:
        raise ReportMismatch(f"{tokens} tokens of {size_bytes} bytes give no perplexity")
    mean = math.fsum(window.nats for window in windows) / tokens
    spread = math.fsum((window.nats - mean * window.tokens) ** 2 for window in windows)
    clusters = len(windows)
    error = math.sqrt(spread * clusters / (clusters - 1)) / tokens if clusters > 1 else math.inf
    return Perplexity(
        token=_estimate(mean, error),
        byte=_estimate(mean * tokens / size_bytes, error * tokens / size_bytes),
        tokens=tokens,
        size_bytes=size_bytes,
    )


def check_tokens(count: int) -> None:
    """Raises TooFewTokens below the number that a perplexity must rest on (R-097)."""
    if count < limits.PERPLEXITY_TOKENS_MIN:
        raise TooFewTokens(
            f"the text has {count} tokens, a perplexity needs {limits.PERPLEXITY_TOKENS_MIN}; take a longer text"
        )


def check_sane(found: Perplexity, vocab_size: int) -> None:
    """Raises AbsurdPerplexity where the model hardly does better than guessing (R-097)."""
    bound = limits.PERPLEXITY_VOCABULARY_SHARE_MAX * vocab_size
    if not found.token.value <= bound:
        raise AbsurdPerplexity(
            f"the perplexity is {found.token.value:.0f}, more than {bound:.0f}, half the vocabulary of {vocab_size}:"
            " that is guessing; check that weights and tokenizer are the model's"
        )


def _estimate(mean: float, error: float) -> Estimate:
    """exp of a mean in nats and of the ends of its interval; a mean beyond floats is infinite."""
    value, low, high = (_exp(nats) for nats in (mean, max(0.0, mean - Z_95 * error), mean + Z_95 * error))
    return Estimate(value=value, low=low, high=high)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
