"""What telemetry says about a generation: how long it waited, computed and wrote; never what it said."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.inference.runtime import Generation
from services.inference.stream import Piece
from smeltkit.telemetry import histogram, names, span


async def observed(generation: Generation, model: str) -> AsyncGenerator[Piece, None]:
    """The pieces of `generation`, inside a span that ends with its usage, and counted in the metrics."""
    started, first, engine = time.monotonic(), 0.0, {names.ENGINE: "llama"}
    with span("smelt.inference.generate") as record:
        record.set_attributes({names.GEN_AI_OPERATION: "generate", names.GEN_AI_MODEL: model})
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                first = first or time.monotonic()
                yield piece
                if piece.finish is not None:
                    record.set_attribute(names.GEN_AI_FINISH_REASONS, [piece.finish.value])
        prompt_tokens = len(generation.sequence.tokens) - generation.stream.count
        record.set_attribute(names.GEN_AI_INPUT_TOKENS, prompt_tokens)
        record.set_attribute(names.GEN_AI_OUTPUT_TOKENS, generation.stream.count)
        for name, moment_ns in generation.marks_ns.items():
            record.add_event(name, timestamp=moment_ns)
    ended = time.monotonic()
    histogram(names.GEN_AI_SERVER_DURATION).record(ended - started, engine)
    histogram(names.GEN_AI_FIRST_TOKEN).record(first - started, engine)
    if generation.stream.count > 1:
        histogram(names.GEN_AI_TIME_PER_TOKEN).record((ended - first) / (generation.stream.count - 1), engine)
    histogram(names.GEN_AI_TOKENS).record(prompt_tokens, {**engine, names.GEN_AI_TOKEN_TYPE: "input"})
    histogram(names.GEN_AI_TOKENS).record(generation.stream.count, {**engine, names.GEN_AI_TOKEN_TYPE: "output"})
