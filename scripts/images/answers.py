"""What llama.cpp answers, greedily: `answers.py MODEL.gguf THREADS [LIBRARY]`, prompts as lists of ids on stdin.

Run by an image's Python, or by this machine's. LIBRARY computes in place of the one that a service takes. It prints for
each prompt the chosen ids, and by how much each one's logit exceeds the next best.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from services.inference.engine import Rows
from services.inference.llama import LIBRARIES, LlamaConfig, LlamaEngine

TOKENS = 24
"""Tokens of an answer."""
_CELLS = 512


def main(model: str, threads: str, library: str = "") -> None:
    """Reads, computes, prints."""
    if library:
        load = ctypes.CDLL(str(LIBRARIES / "libggml.so")).ggml_backend_load
        load.restype = ctypes.c_void_p
        if not load(str(LIBRARIES / library).encode()):
            raise SystemExit(f"{library} does not run on this CPU")
    config = LlamaConfig(slots=1, cells=_CELLS, is_split=False, batch_rows=_CELLS, output_rows=1, threads=int(threads))
    engine = LlamaEngine(Path(model), config)
    try:
        print(json.dumps([_answer(engine, prompt) for prompt in json.load(sys.stdin)]))
    finally:
        engine.close()


def _answer(engine: LlamaEngine, prompt: list[int]) -> dict[str, list[Any]]:
    ids: list[int] = []
    margins: list[float] = []
    fresh, held = prompt, 0
    while len(ids) < TOKENS:
        end = held + len(fresh)
        rows = Rows(tokens=fresh, positions=list(range(held, end)), slots=[0] * len(fresh))
        rows.outputs = [position == end - 1 for position in rows.positions]
        logits = engine.decode(rows)[0]
        second, first = np.partition(logits, -2)[-2:].tolist()
        ids.append(int(logits.argmax()))
        margins.append(first - second)
        fresh, held = ids[-1:], end
    engine.cut(0, 0)
    return {"ids": ids, "margins": margins}


if __name__ == "__main__":
    main(*sys.argv[1:])
