"""A model on an engine that counts: requests in, completions out, nobody else hurt when one leaves or fails."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from toy_engine import CountingEngine

from services.inference import probe
from services.inference.config import InferenceConfig
from services.inference.language import Language
from services.inference.model import GenerateOptions, Model
from services.inference.probe import collect, run_probe
from services.inference.runtime import Pace
from services.inference.stream import Finish
from smeltkit.errors import (
    BadRequest,
    BadSampling,
    EngineUnavailable,
    PromptTooLong,
    TooManyRequests,
    UnsupportedOption,
)
from smeltkit.ml.bundle import Bundle
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.sampling import SamplingParams
from smeltkit.testing.tiny_models import write_tiny_model
from smeltkit.testing.waiting import eventually

GREEDY = SamplingParams()
SETTINGS = InferenceConfig(slots=4, waiting_max=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle folder of a tiny chat model."""
    folder = tmp_path_factory.mktemp("bundle")
    write_tiny_model(folder, "qwen2")
    Bundle.from_folder(folder, lineage=Lineage(operation="import", code_revision="test")).write_parts(folder)
    return folder


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
async def model(folder: Path, engine: CountingEngine) -> AsyncIterator[Model]:
    model = Model(Language(folder), engine, SETTINGS)
    yield model
    engine.gate.set()
    await model.runtime.close()


def ids(model: Model, *values: int) -> list[int]:
    return model.language.check_ids(values).ids


async def complete(model: Model, first: int, **options: object) -> list[int]:
    prompt = model.language.check_ids([first])
    wanted = GenerateOptions(**{"sampling": GREEDY, "max_tokens": 5, **options})  # type: ignore[arg-type]
    return (await collect(model.generate(prompt, wanted).generation)).ids


async def test_greedy_takes_the_best_token_each_time(model: Model) -> None:
    assert await complete(model, 100) == [101, 102, 103, 104, 105]


async def test_an_engine_rests_once_it_has_nothing_to_compute(model: Model, engine: CountingEngine) -> None:
    await eventually(lambda: engine.rests == 1)
    await complete(model, 100)
    await eventually(lambda: engine.rests == 2)
    await asyncio.gather(*(complete(model, first) for first in range(0, 120, 20)))
    await eventually(lambda: engine.rests >= 3)
    assert engine.rests <= 2 + 6 and engine.steps


async def test_many_at_once_get_what_each_would_get_alone(model: Model) -> None:
    """R-040 holds exactly where the engine's numbers do not depend on the batch."""
    results = await asyncio.gather(*(complete(model, first) for first in range(0, 120, 20)))
    assert results == [[first + i for i in range(1, 6)] for first in range(0, 120, 20)]


async def test_sampling_with_a_seed_repeats_itself(model: Model) -> None:
    warm = SamplingParams(temperature=10.0, seed=7)
    assert await complete(model, 100, sampling=warm) == await complete(model, 100, sampling=warm)
    assert await complete(model, 100, sampling=warm) != await complete(
        model, 100, sampling=SamplingParams(temperature=10.0, seed=8)
    )


async def test_max_tokens_zero_fills_the_context(model: Model) -> None:
    """R-033: without a limit in the request, the bundle's context is the only one."""
    generated = await complete(model, 0, max_tokens=0, ignore_stop=True)
    assert len(generated) + 1 == model.context_tokens == 256


async def test_logprobs_come_with_each_token(model: Model) -> None:
    prompt = model.language.check_ids([100])
    options = GenerateOptions(sampling=GREEDY, max_tokens=2, logprobs=2)
    piece = await collect(model.generate(prompt, options).generation)
    assert [detail.id for detail in piece.details] == [101, 102]
    assert piece.details[0].top[0] == (101, piece.details[0].logprob)
    assert piece.details[0].logprob == pytest.approx(0.0, abs=1e-6)


async def test_score_gives_each_token_its_logprob(model: Model) -> None:
    scores = await model.score(model.language.check_ids([5, 6, 9, 10])).result()
    assert scores[0] == 0.0
    assert scores[1] == pytest.approx(0.0, abs=1e-6)
    assert scores[2] == pytest.approx(-20.0, abs=1e-3)


async def test_a_prompt_longer_than_the_context_is_refused(model: Model) -> None:
    """R-035: an error, with both lengths and the ways out."""
    prompt = model.language.check_ids([1] * 256)
    with pytest.raises(PromptTooLong, match=r"256 prompt tokens and 1 new .* truncate_prompt"):
        model.generate(prompt, GenerateOptions(sampling=GREEDY))


async def test_prompt_and_new_tokens_together_must_fit(model: Model) -> None:
    """R-033: what is asked for is given or refused, never lowered in silence."""
    with pytest.raises(PromptTooLong):
        model.generate(model.language.check_ids([1] * 200), GenerateOptions(sampling=GREEDY, max_tokens=57))


async def test_truncation_drops_the_oldest_tokens_and_counts_them(model: Model) -> None:
    """R-035: only where asked for, and the count comes back."""
    prompt = model.language.check_ids(list(range(300)))
    completion = model.generate(prompt, GenerateOptions(sampling=GREEDY, max_tokens=6, truncate_prompt=True))
    assert (completion.prompt_tokens, completion.dropped_tokens) == (250, 50)
    assert (await collect(completion.generation)).ids[0] == 300


async def test_cancel_frees_the_slot_and_the_reason_says_so(model: Model, engine: CountingEngine) -> None:
    long = GenerateOptions(sampling=GREEDY, ignore_stop=True)
    generations = [model.generate(model.language.check_ids([i]), long).generation for i in range(4)]
    waiting = asyncio.create_task(complete(model, 200))
    for generation in generations:
        model.runtime.cancel(generation)
    assert await waiting == [201, 202, 203, 204, 205]
    finished = [(await collect(generation)).finish for generation in generations]
    assert set(finished) <= {Finish.CANCELLED, Finish.LENGTH}
    await eventually(lambda: model.runtime.running == 0)


async def test_tokens_of_a_slow_reader_arrive_together(model: Model, engine: CountingEngine) -> None:
    generation = model.generate(
        model.language.check_ids([1]), GenerateOptions(sampling=GREEDY, max_tokens=60, ignore_stop=True)
    ).generation
    await eventually(lambda: generation.is_ended)
    await asyncio.sleep(0)
    pieces = [piece async for piece in generation.pieces()]
    assert len(pieces) == 1 and len(pieces[0].ids) == 60


async def test_final_only_gives_one_piece_with_everything(model: Model) -> None:
    """Also where the completion is longer than what a stream would have held back."""
    wanted = GenerateOptions(sampling=GREEDY, max_tokens=40, final_only=True)
    generation = model.generate(model.language.check_ids([100]), wanted).generation
    pieces = [piece async for piece in generation.pieces()]
    assert [piece.ids for piece in pieces] == [list(range(101, 141))]
    assert pieces[0].finish is Finish.LENGTH


def test_the_pace_of_prompts_follows_what_steps_took() -> None:
    """A few rows before anything is known; slow rows leave what always goes; steps of few rows tell nothing."""
    pace = Pace()
    assert not pace.measured(8, 100.0)
    assert pace.rows_in(0.4) == 128
    assert pace.measured(512, 0.1)
    assert pace.rows_in(0.4) == 2048
    for _ in range(40):
        pace.measured(100, 0.4)
    assert 99 <= pace.rows_in(0.4) <= 101
    for _ in range(40):
        pace.measured(32, 60.0)
    assert pace.rows_in(0.4) == 32


async def test_what_every_load_repeats_is_not_cut_by_a_slow_machine(
    model: Model, engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "rows_in", lambda pace, seconds: 32)
    monkeypatch.setattr(probe, "CHAT_TOKENS", 1)
    monkeypatch.setattr(probe, "TASKS", probe.TASKS[: probe.READY_PROMPTS + 1])
    await run_probe(model)
    assert engine.steps[0] == engine.info.batch_rows > 32
    assert engine.steps[-2] == 32


async def test_a_full_queue_refuses_the_next_request_only(model: Model, engine: CountingEngine) -> None:
    engine.gate.clear()
    first = asyncio.create_task(complete(model, 0))
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(complete(model, 10 * i)) for i in range(1, 14)]
    await asyncio.sleep(0.05)
    engine.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    refused = [result for result in results if isinstance(result, TooManyRequests)]
    assert refused and len(refused) < len(results)
    assert all(isinstance(result, list | TooManyRequests) for result in results)


async def test_a_failing_engine_gives_every_request_its_error_and_is_closed(
    model: Model, engine: CountingEngine
) -> None:
    engine.gate.clear()
    tasks = [asyncio.create_task(complete(model, 10 * i)) for i in range(3)]
    await asyncio.sleep(0.05)
    engine.breaks = True
    engine.gate.set()
    assert all(isinstance(result, EngineUnavailable) for result in await asyncio.gather(*tasks, return_exceptions=True))
    await eventually(lambda: engine.is_closed)
    with pytest.raises(EngineUnavailable):
        await complete(model, 1)


async def test_closing_ends_what_runs(folder: Path, engine: CountingEngine) -> None:
    model = Model(Language(folder), engine, SETTINGS)
    engine.gate.clear()
    task = asyncio.create_task(complete(model, 1, max_tokens=100, ignore_stop=True))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(model.runtime.close())
    await asyncio.sleep(0.05)
    engine.gate.set()
    await closing
    with pytest.raises(EngineUnavailable, match="unloaded"):
        await task
    assert engine.is_closed


async def test_raw_text_to_a_chat_model_warns(model: Model) -> None:
    """R-037: an instruct bundle asked with raw text says so."""
    assert "chat format" in model.language.encode_text("hello").warnings[0]
    assert model.language.encode_chat([{"role": "user", "content": "hello"}]).warnings == ()


async def test_a_chat_is_rendered_by_the_bundles_template(model: Model) -> None:
    """R-036: the text that was encoded comes back, byte for byte."""
    prompt = model.language.encode_chat([{"role": "user", "content": "hi"}])
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids == model.language.tokenizer.encode(prompt.text)


async def test_a_completion_model_refuses_a_chat(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("")
    contract = json.loads((tmp_path / "base" / "contract.json").read_text())
    (tmp_path / "base" / "contract.json").write_text(json.dumps({**contract, "task": "completion"}))
    language = Language(tmp_path / "base")
    assert language.encode_text("x").warnings == ()
    with pytest.raises(UnsupportedOption, match="no chat template"):
        language.encode_chat([{"role": "user", "content": "x"}])


async def test_token_ids_outside_the_vocabulary_are_refused(model: Model) -> None:
    with pytest.raises(BadRequest, match="384"):
        ids(model, 1, 384)


async def test_an_empty_prompt_is_refused(model: Model) -> None:
    with pytest.raises(BadRequest, match="empty"):
        model.generate(model.language.encode_text(""), GenerateOptions(sampling=GREEDY))


@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_tokens": -1}, BadRequest), ({"logprobs": 21}, BadSampling), ({"logprobs": -2}, BadSampling)],
)
def test_absurd_options_are_refused(options: dict[str, int], error: type[Exception]) -> None:
    with pytest.raises(error, match=str(next(iter(options.values())))):
        GenerateOptions(sampling=GREEDY, **options)  # type: ignore[arg-type]
