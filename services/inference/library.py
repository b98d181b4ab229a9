"""Bundles out of the store into memory: fetch, convert, load, and hold against the recorded probe.

Blocking work goes to threads. A bundle that this engine never ran is probed in a process of its own, and the result is
recorded beside the bundle for every later load.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from services.inference import probe
from services.inference.config import InferenceConfig
from services.inference.fallbacks import Fallbacks, of_weights
from services.inference.language import Language
from services.inference.llama import engine_digest
from services.inference.model import Model, open_engine
from services.inference.probe import ProbeResult
from services.inference.sizing import Sizing, size_model
from smeltkit import limits
from smeltkit.blobs.cache import NodeCache
from smeltkit.blobs.store import Store
from smeltkit.errors import (
    EngineUnavailable,
    OutOfMemory,
    ProbeFailed,
    SmeltError,
    Timeout,
    UnknownArtifact,
    all_errors,
)
from smeltkit.ids import new_id
from smeltkit.manifest import PROBE_TYPE, Manifest
from smeltkit.ml.bundle import GGUF_FILE, Bundle
from smeltkit.ml.gguf_convert import convert_to_gguf

CONVERTED_SCHEME = "F16"


@dataclass(frozen=True, kw_only=True)
class Described:
    """A stored bundle, read but not fetched."""

    digest: str
    manifest: Manifest
    bundle: Bundle
    sizing: Sizing

    @property
    def scheme(self) -> str:
        """Type of most weights as they run."""
        return self.bundle.scheme if self.bundle.format == "gguf" else CONVERTED_SCHEME


@dataclass(frozen=True, kw_only=True)
class Files:
    """A bundle on this machine's disk."""

    folder: Path
    weights: Path


@dataclass(frozen=True, kw_only=True)
class ProbeRun:
    """What a probe in a clean process gave."""

    results: list[ProbeResult]
    engine_digest: str
    load_s: float


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, ready."""

    model: Model
    described: Described
    load_s: float
    id: str = field(default_factory=lambda: new_id("load"))
    """Tells this load from any other."""
    held: AsyncExitStack
    """Its engine and its files, to be given back in this order."""

    async def close(self) -> None:
        """Frees memory and files."""
        await self.held.aclose()


class Library:
    """What this replica knows about stored bundles."""

    def __init__(self, store: Store, settings: InferenceConfig, fallbacks: Fallbacks) -> None:
        self._store = store
        self._settings = settings
        self._fallbacks = fallbacks
        self._cache = NodeCache(settings.cache_dir, store, settings.cache_bytes)
        self._probing = asyncio.Lock()

    async def describe(self, digest: str) -> Described:
        """The bundle of `digest`; UnknownArtifact, or BadManifest if it is no bundle."""
        manifest = await asyncio.to_thread(self._store.get_manifest, digest)
        bundle = Bundle.from_manifest(manifest)
        weights = manifest.layer(GGUF_FILE)
        weights_bytes = weights.size_bytes if weights else 2 * bundle.config.parameters
        sizing = size_model(bundle.config, weights_bytes, self._settings)
        return Described(digest=digest, manifest=manifest, bundle=bundle, sizing=sizing)

    async def load(self, described: Described) -> Loaded:
        """The model, ready: its first probe prompts gave the recorded tokens, else ProbeFailed.

        SettingsDiffer in strict mode if its weights run in another type than they are stored in.
        """
        started = time.monotonic()
        self._fallbacks.report(of_weights(described.bundle.scheme, described.scheme))
        async with AsyncExitStack() as stack:
            files = await stack.enter_async_context(self._files(described))
            expected = await self._recorded(described) or (await self._probe(described, files)).results
            language = await asyncio.to_thread(Language, files.folder)
            engine = await asyncio.to_thread(open_engine, files.weights, described.sizing, self._settings)
            model = Model(language, engine, self._settings)
            stack.push_async_callback(model.runtime.close)
            await probe.check_ready(model, expected)
            held = stack.pop_all()
        return Loaded(model=model, described=described, load_s=time.monotonic() - started, held=held)

    async def probe(self, digest: str) -> ProbeRun:
        """A fresh probe of the bundle in a clean process, recorded; the error it met there, or ProbeFailed."""
        described = await self.describe(digest)
        async with self._files(described) as files:
            return await self._probe(described, files)

    @asynccontextmanager
    async def _files(self, described: Described) -> AsyncIterator[Files]:
        """The bundle's files and its weights as GGUF, on disk while the block runs."""
        stack = ExitStack()
        try:
            yield await asyncio.to_thread(self._materialize, stack, described)
        finally:
            await asyncio.to_thread(stack.close)

    def _materialize(self, stack: ExitStack, described: Described) -> Files:
        folder = stack.enter_context(self._cache.materialize(described.manifest))
        if described.bundle.format == "gguf":
            return Files(folder=folder, weights=folder / GGUF_FILE)
        converted = self._cache.derived(
            f"{described.digest}/{CONVERTED_SCHEME}.gguf",
            lambda path: _convert(folder, path),
            size_bytes=2 * described.bundle.config.parameters,
        )
        return Files(folder=folder, weights=stack.enter_context(converted))

    async def _probe(self, described: Described, files: Files) -> ProbeRun:
        """Runs and records a probe; one at a time, since it loads the model a second time."""
        request = {
            "folder": str(files.folder),
            "weights": str(files.weights),
            "sizing": asdict(described.sizing),
            "settings": {**asdict(self._settings), "cache_dir": str(self._settings.cache_dir)},
        }
        async with self._probing:
            answer = await _run_probe_process(request)
        results = [ProbeResult.from_dict(result) for result in answer["results"]]
        await asyncio.to_thread(self._record, described.digest, answer)
        return ProbeRun(results=results, engine_digest=answer["engine_digest"], load_s=answer["load_s"])

    def _record(self, digest: str, answer: dict[str, Any]) -> None:
        config = {"version": probe.PROBE_VERSION, **answer, "load_s": round(answer["load_s"], 3)}
        manifest = Manifest(artifact_type=PROBE_TYPE, config=config, subject=digest)
        self._store.put_ref(_probe_ref(digest, answer["engine_digest"]), self._store.put_manifest(manifest))

    async def _recorded(self, described: Described) -> list[ProbeResult]:
        """The recorded probe of this bundle on this engine; empty if there is none of this version."""
        name = _probe_ref(
            described.digest, engine_digest(self._settings.thread_count, is_upstream=self._settings.is_upstream)
        )
        try:
            record = await asyncio.to_thread(self._store.get_ref, name)
            if record is None:
                return []
            config = (await asyncio.to_thread(self._store.get_manifest, record)).config
        except UnknownArtifact:
            return []
        if config.get("version") != probe.PROBE_VERSION:
            return []
        return [ProbeResult.from_dict(result) for result in config["results"]]


def _convert(folder: Path, path: Path) -> None:
    convert_to_gguf(folder, path, dtype=CONVERTED_SCHEME)


def _probe_ref(digest: str, engine: str) -> str:
    return f"probes/{digest.removeprefix('sha256:')}/{engine.removeprefix('sha256:')}"


async def _run_probe_process(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a probe process; the error it reports or that its death means, Timeout if it hangs."""
    kills = _memory_kills()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.inference.probe_process",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(limits.PROBE_TIMEOUT_S):
            output, errors = await process.communicate(json.dumps(request).encode())
    except TimeoutError as error:
        raise Timeout(f"the probe took more than {limits.PROBE_TIMEOUT_S:.0f} s; the model is too slow here") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        tail = errors.decode(errors="replace").strip()[-400:]
        raise _error_of_death(process.returncode or 0, tail, is_out_of_memory=_memory_kills() > kills)
    answer: dict[str, Any] = json.loads(output)
    if "error" in answer:
        raise _error_of(answer["error"])
    return answer


def _error_of_death(status: int, tail: str, *, is_out_of_memory: bool) -> SmeltError:
    """What it means that a probe process ended with `status`, negative for a signal: only a kill is worth a retry."""
    if status == -signal.SIGKILL and is_out_of_memory:
        return OutOfMemory("the machine ran out of memory while the model was probed; quantize it or lower its context")
    if status in (-signal.SIGKILL, -signal.SIGTERM):
        return EngineUnavailable(f"the probe process was ended from outside by {signal.Signals(-status).name}")
    how = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return ProbeFailed(f"the engine {how} on this bundle's probe prompts; its log ends: {tail or 'no words'}")


def _memory_kills() -> int:
    """How often the kernel has killed a process for want of memory since the machine started."""
    counters = Path("/proc/vmstat")
    found = re.search(r"^oom_kill (\d+)$", counters.read_text() if counters.exists() else "", re.MULTILINE)
    return int(found[1]) if found else 0


def _error_of(error: dict[str, str]) -> SmeltError:
    """The error that a probe process reported, as its class of the tree."""
    return all_errors().get(error["reason"], ProbeFailed)(error["message"])
