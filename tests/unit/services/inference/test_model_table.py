"""Which models are in memory: loaded once, within the budget, unloaded when idle, failed with a reason."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from services.inference import models as table
from services.inference.models import Models, State
from smeltkit.errors import Draining, EngineUnavailable, OutOfMemory, ProbeFailed, StoreUnavailable, UnknownArtifact
from smeltkit.testing.waiting import eventually


class Shelf:
    """Implements `Source` with models that are nothing but a size; `errors` are raised at their next load."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.loads, self.closed = sizes, [], []
        self.errors: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def describe(self, digest: str) -> Any:
        if digest not in self.sizes:
            raise UnknownArtifact(f"{digest} is not stored")
        return SimpleNamespace(digest=digest, sizing=SimpleNamespace(memory_bytes=self.sizes[digest]))

    async def load(self, described: Any) -> Any:
        self.loads.append(described.digest)
        await self.gate.wait()
        if described.digest in self.errors:
            raise self.errors.pop(described.digest)

        async def close() -> None:
            self.closed.append(described.digest)

        runtime = SimpleNamespace(failure=None)
        model = SimpleNamespace(info=SimpleNamespace(name="toy"), runtime=runtime)
        return SimpleNamespace(model=model, load_s=0.1, close=close)


class Ear:
    """Implements `Listener`: remembers."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, ...]] = []

    def loaded(self, digest: str, engine: str, load_s: float) -> None:
        self.heard.append(("loaded", digest, engine))

    def unloaded(self, digest: str, cause: str) -> None:
        self.heard.append(("unloaded", digest, cause))


def made(shelf: Shelf, *, budget: int = 100, idle_s: float = 0.0, kept: tuple[str, ...] = ()) -> tuple[Models, Ear]:
    ear = Ear()
    return Models(shelf, ear, budget_bytes=budget, idle_unload_s=idle_s, kept=kept), ear  # type: ignore[arg-type]


async def touch(models: Models, digest: str) -> None:
    async with models.use(digest):
        pass


def digests(models: Models) -> list[str]:
    return [entry.digest for entry in models.list()]


async def test_a_model_is_loaded_once_however_many_ask() -> None:
    shelf = Shelf(a=10)
    models, ear = made(shelf)
    await asyncio.gather(*(touch(models, "a") for _ in range(20)))
    assert shelf.loads == ["a"]
    assert ear.heard == [("loaded", "a", "toy")]


async def test_a_client_that_leaves_does_not_stop_the_load() -> None:
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    shelf.gate.clear()
    asker = asyncio.create_task(touch(models, "a"))
    await eventually(lambda: shelf.loads)
    asker.cancel()
    shelf.gate.set()
    await touch(models, "a")
    assert shelf.loads == ["a"]


async def test_room_is_made_by_the_idle_model_used_longest_ago() -> None:
    shelf = Shelf(a=40, b=40, c=40)
    models, ear = made(shelf)
    for digest in ("a", "b", "a", "c"):
        await touch(models, digest)
    assert digests(models) == ["a", "c"]
    assert ("unloaded", "b", "idle") in ear.heard


async def test_a_model_in_use_is_never_taken_away() -> None:
    shelf = Shelf(a=60, b=60)
    models, _ = made(shelf)
    async with models.use("a"):
        with pytest.raises(OutOfMemory, match="models in use"):
            await touch(models, "b")
        assert "a" in digests(models)


async def test_a_model_larger_than_the_budget_is_refused_with_the_remedy() -> None:
    models, _ = made(Shelf(a=101))
    with pytest.raises(OutOfMemory, match="101 bytes of memory, this replica may use 100; quantize"):
        await touch(models, "a")


async def test_a_failed_model_is_listed_with_its_reason_and_answers_with_it() -> None:
    """R-043: a model whose probe failed takes no request."""
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    shelf.errors["a"] = ProbeFailed("other tokens")
    for _ in range(2):
        with pytest.raises(ProbeFailed, match="other tokens"):
            await touch(models, "a")
    assert shelf.loads == ["a"]
    assert (models.list()[0].state, models.list()[0].memory_bytes) == (State.FAILED, 0)


async def test_load_tries_a_failed_model_again() -> None:
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    shelf.errors["a"] = ProbeFailed("other tokens")
    with pytest.raises(ProbeFailed):
        await touch(models, "a")
    assert (await models.load("a")).state is State.READY


async def test_a_failure_that_may_pass_is_tried_again_at_once() -> None:
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    shelf.errors["a"] = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        await touch(models, "a")
    await touch(models, "a")
    assert shelf.loads == ["a", "a"]


async def test_an_unexpected_error_becomes_a_typed_one() -> None:
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    shelf.errors["a"] = ValueError("odd")
    with pytest.raises(EngineUnavailable, match="odd"):
        await touch(models, "a")


async def test_an_unknown_digest_is_unknown() -> None:
    models, _ = made(Shelf())
    with pytest.raises(UnknownArtifact):
        await touch(models, "a")


async def test_unload_waits_for_those_who_use_it_and_takes_nobody_new() -> None:
    shelf = Shelf(a=10)
    models, ear = made(shelf)
    async with models.use("a"):
        unloading = asyncio.create_task(models.unload("a"))
        await eventually(lambda: models.list()[0].state is State.DRAINING)
        with pytest.raises(Draining):
            await touch(models, "a")
        assert not shelf.closed
    await unloading
    assert shelf.closed == ["a"] and ear.heard[-1] == ("unloaded", "a", "asked")


async def test_a_model_whose_engine_died_is_loaded_again() -> None:
    shelf = Shelf(a=10)
    models, ear = made(shelf)
    async with models.use("a") as loaded:
        loaded.model.runtime.failure = EngineUnavailable("died")  # type: ignore[misc]
    await touch(models, "a")
    assert shelf.loads == ["a", "a"]
    assert ("unloaded", "a", "failed") in ear.heard


async def test_the_sweep_unloads_what_is_idle_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(a=10, b=10)
    models, ear = made(shelf, idle_s=0.01)
    stop = asyncio.Event()
    async with models.use("b"):
        await touch(models, "a")
        monkeypatch.setattr(table.limits, "MODEL_SWEEP_PERIOD_S", 0.01)
        sweeping = asyncio.create_task(models.sweep(stop))
        await eventually(lambda: shelf.closed)
        assert shelf.closed == ["a"] and ear.heard[-1] == ("unloaded", "a", "idle")
    stop.set()
    await sweeping
    assert set(shelf.closed) == {"a", "b"}


async def test_kept_models_are_loaded_at_the_start_and_never_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of the store is waited out; neither another model nor idleness takes them away."""
    monkeypatch.setattr(table.limits, "MODEL_SWEEP_PERIOD_S", 0.01)
    shelf = Shelf(a=40, b=40, c=20, d=60)
    models, _ = made(shelf, idle_s=0.01, kept=("a", "b"))
    shelf.errors["a"] = StoreUnavailable("away")
    await models.load_kept(asyncio.Event())
    assert shelf.loads == ["a", "a", "b"] and models.ready() == {"a", "b"}
    stop = asyncio.Event()
    sweeping = asyncio.create_task(models.sweep(stop))
    await touch(models, "c")
    await eventually(lambda: shelf.closed)
    with pytest.raises(OutOfMemory):
        await touch(models, "d")
    assert shelf.closed == ["c"] and models.ready() == {"a", "b"}
    stop.set()
    await sweeping


async def test_a_kept_model_that_cannot_be_loaded_ends_the_start_with_its_reason() -> None:
    models, _ = made(Shelf(a=10), kept=("a", "gone"))
    with pytest.raises(UnknownArtifact, match="gone is not stored"):
        await models.load_kept(asyncio.Event())


async def test_a_drain_ends_a_model_only_when_its_requests_have_ended() -> None:
    shelf = Shelf(a=10)
    models, _ = made(shelf)
    stop = asyncio.Event()
    sweeping = asyncio.create_task(models.sweep(stop))
    async with models.use("a"):
        assert models.ready() == {"a"}
        stop.set()
        await eventually(lambda: not models.ready())
        with pytest.raises(Draining):
            await touch(models, "a")
        assert not shelf.closed
    await sweeping
    assert shelf.closed == ["a"]


def test_the_toy_has_the_fields_of_the_real_thing() -> None:
    """The doubles above name only fields that exist."""
    from services.inference.library import Described, Loaded

    assert {"digest", "sizing"} <= {field.name for field in dataclasses.fields(Described)}
    assert {"model", "load_s"} <= {field.name for field in dataclasses.fields(Loaded)}
    assert callable(Loaded.close) and AsyncExitStack
