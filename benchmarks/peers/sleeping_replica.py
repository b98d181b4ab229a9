"""A replica of inference whose engine sleeps instead of computing: `python -m benchmarks.peers.sleeping_replica FOLDER
SLOTS STEP_S`, with SMELT_RPC_LISTEN. Everything but the engine is ours: servicer, scheduler, runtime, load reports.

FOLDER holds a bundle's small files. Each step takes STEP_S, however many of the SLOTS take part.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from smelt.inference.v1 import inference_pb2_grpc

from services.inference.config import InferenceConfig
from services.inference.engine import EngineInfo, Logits, Rows
from services.inference.language import Language
from services.inference.library import Loaded
from services.inference.load import Load
from services.inference.model import Model
from services.inference.models import Models
from services.inference.servicer import InferenceServicer
from smeltkit.config import from_environment
from smeltkit.rpc.server import RpcConfig, ServiceHost

CELLS = 65536


class SleepingEngine:
    """Implements `Engine`: the next token is always 7."""

    def __init__(self, slots: int, step_s: float, vocab_size: int) -> None:
        self.info = EngineInfo(
            name="sleeping", digest="sha256:" + "0" * 64, device="none", vocab_size=vocab_size, slots=slots,
            cells=CELLS, slot_cells=1024, batch_rows=512, output_rows=slots, rows_floor=1,
        )  # fmt: skip
        self._step_s = step_s

    def decode(self, rows: Rows) -> Logits:
        """See `Engine.decode`."""
        time.sleep(self._step_s)
        logits = np.zeros((sum(rows.outputs), self.info.vocab_size), np.float32)
        logits[:, 7] = 1.0
        return logits

    def share(self, source: int, target: int, count: int) -> None:
        """Nothing is held."""

    def cut(self, slot: int, count: int) -> None:
        """Nothing is held."""

    def rest(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to free."""


class Source:
    """Where the only model comes from; takes the part of `Library` here."""

    def __init__(self, folder: Path, slots: int, step_s: float) -> None:
        self._language, self._settings = Language(folder), (slots, step_s)

    async def describe(self, digest: str) -> Any:
        """As much of a description as is asked for."""
        return SimpleNamespace(digest=digest, scheme="none", sizing=SimpleNamespace(memory_bytes=0))

    async def load(self, described: Any) -> Loaded:
        """The model."""
        engine = SleepingEngine(*self._settings, self._language.tokenizer.vocab_size)
        model, held = Model(self._language, engine, InferenceConfig()), AsyncExitStack()
        held.push_async_callback(model.runtime.close)
        return Loaded(model=model, described=described, load_s=0.0, held=held)

    def loaded(self, digest: str, engine: str, load_s: float) -> None:
        """Nobody listens."""

    def unloaded(self, digest: str, cause: str) -> None:
        """Nobody listens."""


async def serve(folder: Path, slots: int, step_s: float) -> None:
    """Serves until SIGTERM."""
    host, source = ServiceHost("inference", from_environment(RpcConfig, "SMELT_RPC_")), Source(folder, slots, step_s)
    models = Models(source, source, budget_bytes=1, idle_unload_s=0)
    load: Any = Load(models.ready)
    host.on_drain(load.close)
    servicer = InferenceServicer(models, source, load)  # type: ignore[arg-type]
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    host.add("smelt.inference.v1.InferenceService", add, servicer)
    host.set_ready(True)
    await host.run(models.sweep)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
