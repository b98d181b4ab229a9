"""Inference whose engine answers by a script, with the settings of inference.

Everything but the engine is ours: settings, store, cache, scheduler, runtime, load reports, drain. The script knows the
problems of the suite `basic` and solves those with an even number, so every score is known before it is measured,
whatever shares a step with whatever. A step takes SCRIPTED_STEP_S without using a core: two cores hold many replicas.
Run by its path it stands on the release in the working directory, this one or another.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from benchmarks.peers.sleeping_replica import SleepingEngine
from services.inference import __main__ as service
from services.inference.engine import Logits, Rows
from services.inference.language import Language
from services.inference.library import Described, Library, Loaded
from services.inference.model import Model
from smeltkit.service import run_service

_PROBLEMS = Path(__file__).resolve().parents[2] / "examples" / "data" / "basic.jsonl"
_WRONG = "    return None\n"
_ENDLESS = 7
"""Token of all other answers."""

Ids = tuple[int, ...]


def is_solved(number: int) -> bool:
    """Whether the script solves this problem of the suite."""
    return number % 2 == 0


class ScriptedEngine(SleepingEngine):
    """Implements `Engine`: a prompt of the script is continued by its answer, any other by one token for ever."""

    def __init__(self, slots: int, step_s: float, vocab_size: int, script: Mapping[Ids, Ids]) -> None:
        super().__init__(slots, step_s, vocab_size)
        self._script = script
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._prompts: list[Ids] = [() for _ in range(slots)]

    def decode(self, rows: Rows) -> Logits:
        """See `Engine.decode`."""
        time.sleep(self._step_s)
        logits = np.zeros((sum(rows.outputs), self.info.vocab_size), np.float32)
        outputs = iter(logits)
        for token, position, slot, is_output in zip(rows.tokens, rows.positions, rows.slots, rows.outputs, strict=True):
            self._held[slot][position:] = [token]
            if is_output:
                next(outputs)[self._answer(slot)] = 1.0
        return logits

    def share(self, source: int, target: int, count: int) -> None:
        """See `Engine.share`."""
        self._held[target] = self._held[source][:count]

    def cut(self, slot: int, count: int) -> None:
        """See `Engine.cut`."""
        del self._held[slot][count:]

    def _answer(self, slot: int) -> int:
        held = tuple(self._held[slot])
        if held in self._script:
            self._prompts[slot] = held
        prompt = self._prompts[slot]
        answer = self._script.get(prompt, ()) if held[: len(prompt)] == prompt else ()
        count = len(held) - len(prompt)
        return answer[count] if 0 <= count < len(answer) else _ENDLESS


class ScriptedLibrary(Library):
    """Loads bundles as ever, but for weights and probe: the engine has none."""

    async def load(self, described: Described) -> Loaded:
        """See `Library.load`."""
        began = time.monotonic()
        with self._cache.materialize(described.manifest) as folder:
            language = await asyncio.to_thread(Language, folder)
        step_s = float(os.environ.get("SCRIPTED_STEP_S", "0.02"))
        script = await asyncio.to_thread(_script, language)
        engine = ScriptedEngine(self._settings.slots, step_s, language.tokenizer.vocab_size, script)
        model, held = Model(language, engine, self._settings), AsyncExitStack()
        held.push_async_callback(model.runtime.close)
        return Loaded(model=model, described=described, load_s=time.monotonic() - began, held=held)


def _script(language: Language) -> dict[Ids, Ids]:
    """Prompt and answer of each problem as token ids; an answer ends by itself."""
    found = {}
    for number, line in enumerate(_PROBLEMS.read_text().splitlines()):
        row = json.loads(line)
        answer = language.tokenizer.encode(row["canonical_solution"] if is_solved(number) else _WRONG)
        prompt = language.encode_text(row["prompt"]).ids
        found[tuple(prompt)] = (*answer, language.contract.stop_ids[0])
    return found


if __name__ == "__main__":
    service.Library = ScriptedLibrary  # type: ignore[misc]
    run_service("inference", service.serve)
