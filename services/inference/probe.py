"""The probe: fixed prompts, generated greedily, that show that a bundle works and stops, here and on every replica.

The stored result of a bundle on an engine is what every later load must repeat: a model is ready when the first prompts
give the recorded tokens. Prompts and limits are part of the record's meaning; changing them needs a new PROBE_VERSION.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.inference.language import Prompt
from services.inference.model import Completion, GenerateOptions, Model
from services.inference.runtime import Generation
from services.inference.stream import Finish, Piece
from smeltkit.errors import ProbeFailed
from smeltkit.ml.sampling import SamplingParams

PROBE_VERSION = 1
READY_PROMPTS = 2
"""Prompts generated one by one, first of all, and repeated at every load."""
CHAT_TOKENS = 256
COMPLETION_TOKENS = 64

TASKS = (
    ("returns the sum of a list of numbers", "def sum_list(numbers):\n"),
    ("returns the largest number in a list", "def largest(numbers):\n"),
    ("reverses a string", "def reverse(text):\n"),
    ("counts the vowels in a string", "def count_vowels(text):\n"),
    ("tells whether a number is even", "def is_even(number):\n"),
    ("returns the factorial of n", "def factorial(n):\n"),
    ("returns the n-th Fibonacci number", "def fibonacci(n):\n"),
    ("tells whether a word is a palindrome", "def is_palindrome(word):\n"),
    ("removes duplicates from a list and keeps the order", "def unique(items):\n"),
    ("returns the squares of the numbers in a list", "def squares(numbers):\n"),
    ("counts how often each word occurs in a text", "def word_counts(text):\n"),
    ("tells whether a number is prime", "def is_prime(number):\n"),
    ("returns the greatest common divisor of two numbers", "def gcd(a, b):\n"),
    ("flattens a list of lists", "def flatten(lists):\n"),
    ("sorts a list of words by length", "def by_length(words):\n"),
    ("returns the average of a list of numbers", "def average(numbers):\n"),
    ("converts Celsius to Fahrenheit", "def to_fahrenheit(celsius):\n"),
    ("keeps the positive numbers of a list", "def positives(numbers):\n"),
    ("merges two dictionaries", "def merge(first, second):\n"),
    ("swaps the keys and values of a dictionary", "def invert(mapping):\n"),
    ("returns the second largest number in a list", "def second_largest(numbers):\n"),
    ("joins a list of strings with commas", "def join_with_commas(items):\n"),
    ("returns the number of digits of an integer", "def digit_count(number):\n"),
    ("rotates a list by one place to the left", "def rotate_left(items):\n"),
)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What one prompt gave."""

    prompt: str
    """The prompt as the model read it."""
    ids: tuple[int, ...]
    """Token ids generated, the stop token included."""
    text: str
    """Their text."""
    finish: Finish
    """Why it ended."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompt": self.prompt, "ids": list(self.ids), "text": self.text, "finish": self.finish.value}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ProbeResult:
        """The result of `to_dict`."""
        ids, finish = tuple(map(int, value["ids"])), Finish(value["finish"])
        return cls(prompt=str(value["prompt"]), ids=ids, text=str(value["text"]), finish=finish)


def stopped_share(results: list[ProbeResult]) -> float:
    """Share of the results that ended by a stop token, 0 to 1."""
    return sum(result.finish is Finish.STOP for result in results) / len(results) if results else 0.0


async def run_probe(model: Model) -> list[ProbeResult]:
    """Every prompt's result on a model that nobody else uses: the first alone one by one, the rest side by side."""
    results = await _first(model)
    rest = [_start(model, task) for task in TASKS[READY_PROMPTS:]]
    return results + list(await asyncio.gather(*(_collect(*started) for started in rest)))


async def check_ready(model: Model, expected: list[ProbeResult]) -> None:
    """Raises ProbeFailed unless the first prompts give the tokens recorded."""
    for given, wanted in zip(await _first(model), expected, strict=False):
        if given.ids != wanted.ids:
            at = next(
                (i for i, (one, other) in enumerate(zip(given.ids, wanted.ids, strict=False)) if one != other),
                min(len(given.ids), len(wanted.ids)),
            )
            raise ProbeFailed(
                f"the loaded model differs from its recorded probe at token {at} of {wanted.prompt[:60]!r}: "
                f"{given.text[:60]!r} instead of {wanted.text[:60]!r}; its weights or its engine are not what they were"
            )


def probe_prompt(model: Model, task: tuple[str, str]) -> Prompt:
    """A task as the model takes it: a chat message, or the beginning of a function."""
    description, beginning = task
    if model.language.template is None:
        return model.language.encode_text(f'{beginning}    """Return what a function that {description} returns."""\n')
    return model.language.encode_chat([{"role": "user", "content": f"Write a Python function that {description}."}])


async def _first(model: Model) -> list[ProbeResult]:
    """What every load repeats, in steps that are the same wherever and whenever it runs."""
    with model.runtime.unpaced():
        return [await _collect(*_start(model, task)) for task in TASKS[:READY_PROMPTS]]


def _start(model: Model, task: tuple[str, str]) -> tuple[Prompt, Completion]:
    prompt = probe_prompt(model, task)
    wanted = COMPLETION_TOKENS if model.language.template is None else CHAT_TOKENS
    max_tokens = max(1, min(wanted, model.context_tokens - len(prompt.ids)))
    return prompt, model.generate(prompt, GenerateOptions(sampling=SamplingParams(), max_tokens=max_tokens))


async def _collect(prompt: Prompt, completion: Completion) -> ProbeResult:
    whole = await collect(completion.generation)
    assert whole.finish is not None
    return ProbeResult(prompt=prompt.text, ids=tuple(whole.ids), text=whole.text, finish=whole.finish)


async def collect(generation: Generation) -> Piece:
    """The whole completion."""
    whole = Piece()
    async for piece in generation.pieces():
        whole.add(piece)
    return whole
