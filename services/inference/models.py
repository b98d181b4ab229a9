"""Which models are in memory: loaded on first use, within a budget of bytes, unloaded when idle, failed with a reason.

One table of entries on the event loop; loading runs as a task of its own, so a client that leaves does not stop it.
Room is made by unloading idle models, least recently used first; a model in use is never taken away, nor one that this
replica is there for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from services.inference.library import Described, Loaded
from smeltkit import limits
from smeltkit.errors import Draining, EngineUnavailable, OutOfMemory, SmeltError

log = logging.getLogger(__name__)


class State(Enum):
    """How far a model is."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"


class Source(Protocol):
    """Where models come from; `Library` is one."""

    async def describe(self, digest: str) -> Described:
        """What the bundle of `digest` is and needs."""
        ...

    async def load(self, described: Described) -> Loaded:
        """The model, ready."""
        ...


class Listener(Protocol):
    """Who is told about models; must not block."""

    def loaded(self, digest: str, engine: str, load_s: float) -> None:
        """A model became ready."""
        ...

    def unloaded(self, digest: str, cause: str) -> None:
        """A model left: `idle`, `asked` or `failed`."""
        ...


@dataclass(eq=False)
class Entry:
    """One model of the table."""

    digest: str
    state: State = State.LOADING
    memory_bytes: int = 0
    """Bytes promised to it while it loads and runs."""
    loaded: Loaded | None = None
    error: SmeltError | None = None
    changed_s: float = field(default_factory=time.monotonic)
    """When it was last used or changed its state, on the monotonic clock."""
    users: int = 0
    """Requests that hold it."""
    task: asyncio.Task[None] | None = None
    """The load under way."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nobody holds it."""

    @property
    def is_idle(self) -> bool:
        """Whether it could be unloaded at once."""
        return self.state is State.READY and not self.users


class Models:
    """The models of this replica."""

    def __init__(
        self,
        source: Source,
        listener: Listener,
        *,
        budget_bytes: int,
        idle_unload_s: float,
        kept: Collection[str] = (),
    ) -> None:
        """`kept` are digests of models that `load_kept` loads and only a call of `unload` takes away."""
        self._kept = kept
        self._source = source
        self._listener = listener
        self._budget_bytes = budget_bytes
        self._idle_unload_s = idle_unload_s
        self._entries: dict[str, Entry] = {}
        self._room = asyncio.Lock()

    def list(self) -> list[Entry]:
        """Every model, loading and failed ones included."""
        return list(self._entries.values())

    def ready(self) -> frozenset[str]:
        """Digests of the models that take requests at once."""
        return frozenset(entry.digest for entry in self._entries.values() if entry.state is State.READY)

    @asynccontextmanager
    async def use(self, digest: str) -> AsyncIterator[Loaded]:
        """The model, loaded on first use and held in memory while the block runs; the reason if it cannot be."""
        entry = await self._ready(digest)
        assert entry.loaded is not None
        entry.users += 1
        entry.idle.clear()
        try:
            yield entry.loaded
        finally:
            entry.users -= 1
            entry.changed_s = time.monotonic()
            if not entry.users:
                entry.idle.set()

    async def load(self, digest: str) -> Entry:
        """The entry of a model that is ready; a failed one is tried again."""
        entry = self._entries.get(digest)
        if entry is not None and entry.state is State.FAILED:
            del self._entries[digest]
        return await self._ready(digest)

    async def load_kept(self, stop: asyncio.Event) -> None:
        """Returns once every kept model is ready, or `stop` is set; errors that may pass are waited out."""
        missing = list(self._kept)
        while missing and not stop.is_set():
            try:
                await self.load(missing[0])
                del missing[0]
            except SmeltError as error:
                if not error.retryable:
                    raise
                log.warning("a kept model is not there yet: %s", error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), limits.MODEL_SWEEP_PERIOD_S)

    async def unload(self, digest: str, cause: str = "asked") -> None:
        """Ends a model when its requests have ended; nothing happens if it is not there."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        if entry.task is not None:
            with suppress(SmeltError):
                await asyncio.shield(entry.task)
        if entry.state is State.FAILED:
            self._entries.pop(digest, None)
        elif entry.state is State.READY:
            entry.state = State.DRAINING
            await entry.idle.wait()
            await self._close(entry, cause)

    async def sweep(self, stop: asyncio.Event) -> None:
        """Unloads what is idle or broken until `stop` is set; then everything, each model once its requests ended."""
        while not stop.is_set():
            for entry in self.list():
                await self._sweep(entry)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), limits.MODEL_SWEEP_PERIOD_S)
        await asyncio.gather(*(self.unload(entry.digest) for entry in self.list()))

    async def _sweep(self, entry: Entry) -> None:
        if entry.loaded is not None and entry.loaded.model.runtime.failure is not None:
            await self._close(entry, "failed")
        elif self._is_spare(entry) and 0 < self._idle_unload_s < time.monotonic() - entry.changed_s:
            await self._close(entry, "idle")

    async def _ready(self, digest: str) -> Entry:
        """The entry of `digest` once it is ready; waits for a load under way, starts one where there is none."""
        while True:
            entry = self._entries.get(digest)
            if entry is None or _is_worth_retrying(entry):
                entry = self._entries[digest] = Entry(digest)
                entry.task = asyncio.create_task(self._load(entry), name=f"load {digest}")
            if entry.task is not None:
                await asyncio.shield(entry.task)
            if entry.error is not None:
                raise entry.error
            if entry.state is State.DRAINING:
                raise Draining(f"{digest} is being unloaded; send the request again", retry_after_s=1.0)
            if entry.loaded is not None and entry.loaded.model.runtime.failure is not None:
                await self._close(entry, "failed")
            else:
                return entry

    async def _load(self, entry: Entry) -> None:
        try:
            described = await self._source.describe(entry.digest)
            async with self._room:
                await self._make_room(entry, described.sizing.memory_bytes)
            entry.loaded = await self._source.load(described)
            entry.state = State.READY
            entry.idle.set()
            self._listener.loaded(entry.digest, entry.loaded.model.info.name, entry.loaded.load_s)
        except Exception as error:
            log.exception("cannot load %s", entry.digest)
            entry.error = error if isinstance(error, SmeltError) else EngineUnavailable(f"cannot be loaded: {error!r}")
            entry.state, entry.memory_bytes = State.FAILED, 0
        finally:
            entry.task, entry.changed_s = None, time.monotonic()

    async def _make_room(self, entry: Entry, memory_bytes: int) -> None:
        """Promises `memory_bytes` to `entry`, unloading idle models for it; OutOfMemory says what is missing."""
        if memory_bytes > self._budget_bytes:
            raise OutOfMemory(
                f"{entry.digest} needs {memory_bytes} bytes of memory, this replica may use {self._budget_bytes}; "
                "quantize it further, lower SMELT_INFERENCE_KV_BYTES or raise SMELT_INFERENCE_MEMORY_BYTES"
            )
        idle = sorted(filter(self._is_spare, self.list()), key=lambda other: other.changed_s)
        while sum(other.memory_bytes for other in self.list()) + memory_bytes > self._budget_bytes:
            if not idle:
                raise OutOfMemory(
                    f"{entry.digest} needs {memory_bytes} bytes of memory, and models in use leave fewer of the "
                    f"{self._budget_bytes} allowed; unload one or try again later"
                )
            await self._close(idle.pop(0), "idle")
        entry.memory_bytes = memory_bytes

    def _is_spare(self, entry: Entry) -> bool:
        return entry.is_idle and entry.digest not in self._kept

    async def _close(self, entry: Entry, cause: str) -> None:
        """Takes `entry` out of the table and frees its memory."""
        if self._entries.get(entry.digest) is not entry:
            return
        del self._entries[entry.digest]
        if entry.task is not None:
            entry.task.cancel()
        if entry.loaded is not None:
            await entry.loaded.close()
            self._listener.unloaded(entry.digest, cause)


def _is_worth_retrying(entry: Entry) -> bool:
    """Whether a failed model may be tried again: at once if that can help, else after a while."""
    if entry.state is not State.FAILED or entry.error is None:
        return False
    return entry.error.retryable or time.monotonic() - entry.changed_s > limits.MODEL_FAILED_RETRY_S
