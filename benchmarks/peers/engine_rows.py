"""Our engine with many rows a step against llama_cpp.Llama, which decodes one sequence after the other."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks import results
from benchmarks.peers.llama_server import batched_bench
from benchmarks.peers.random_model import FILE_TYPES, write_random_models
from services.inference.llama import LlamaConfig, LlamaEngine, has_row_kernels, system_info, use_row_kernels
from services.inference.runtime import Generation, Runtime
from services.inference.scheduler import Bounds, Scheduler, Sequence
from services.inference.stream import StopRule, TokenStream
from smeltkit.ml.bundle import GGUF_FILE, Bundle
from smeltkit.ml.gguf_convert import convert_to_gguf
from smeltkit.ml.lineage import Lineage
from smeltkit.ml.sampling import Sampler, SamplingParams
from smeltkit.testing.waiting import eventually

TARGETS = {"Q4_K_M": 4.0, "Q8_0": 6.0}
ROWS, PROMPT_TOKENS, NEW_TOKENS, CONTEXT_TOKENS = 16, 32, 32, 256
PROMPT_IDS_MAX = 100_000
PROMPTS_TIMEOUT_S = 600.0


class _Spelling:
    """Stands in for the tokenizer that a random model lacks: every token is one letter."""

    special_ids = frozenset[int]()

    def token_bytes(self, id: int) -> bytes:
        return b"x"


def measure(
    folder: Path, *, threads: int, pairs: int, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """One row a scheme: tokens per second at ROWS rows and one at a time, their ratio, and the bare library's.

    `keep` is called with the rows so far whenever there is another.
    Each side computes on a thread that ends with it: OpenMP's helpers of one would slow down those of the other.
    """
    system_info()
    rows = []
    for scheme, path in write_random_models(folder, TARGETS).items():
        random = np.random.default_rng(0)
        prompts = [random.integers(0, PROMPT_IDS_MAX, PROMPT_TOKENS).tolist() for _ in range(ROWS)]
        ours, theirs = [], []
        for _ in range(pairs):
            ours.append(asyncio.run(_together(path, prompts, threads)))
            with ThreadPoolExecutor(1) as its_thread:
                theirs.append(its_thread.submit(_one_by_one, path, prompts[:2], threads).result())
        bare = batched_bench(path, rows=ROWS, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, threads=threads)
        rows.append(
            {
                "scheme": scheme,
                "rows": ROWS,
                "kernels": "ours" if has_row_kernels() else "llama.cpp",
                "tokens_per_second": statistics.median(ours),
                "llama_class": statistics.median(theirs),
                "ratio": results.median_ratio(ours, theirs),
                "target": TARGETS[scheme],
                "pairs": pairs,
                "bare_rows": bare["rows"],
                "bare_one_row": bare["one_row"],
                "bare_ratio": bare["rows"] / bare["one_row"],
                "runs_ours": ours,
                "runs_theirs": theirs,
            }
        )
        keep(rows)
    return rows


async def _together(path: Path, prompts: list[list[int]], threads: int) -> float:
    """Tokens per second of all prompts at once, from the first token that all have to the last."""
    config = LlamaConfig(
        slots=ROWS, cells=ROWS * CONTEXT_TOKENS, is_split=True, batch_rows=512, output_rows=ROWS, threads=threads
    )
    engine = LlamaEngine(path, config)
    bounds = Bounds(
        slots=ROWS,
        cells=engine.info.cells,
        slot_cells=engine.info.slot_cells,
        batch_rows=512,
        output_rows=ROWS,
        rows_floor=engine.info.rows_floor,
    )
    runtime = Runtime(engine, Scheduler(bounds), vocab_size=engine.info.vocab_size, flush_s=0.01, step_s=1.0)
    generations = []
    for prompt in prompts:
        stream = TokenStream(_Spelling(), StopRule(max_tokens=NEW_TOKENS))  # type: ignore[arg-type]
        work = Sequence(list(prompt), PROMPT_TOKENS + NEW_TOKENS)
        generations.append(Generation(work, stream, Sampler(SamplingParams())))
        runtime.submit(generations[-1])
    await eventually(lambda: all(generation.stream.count for generation in generations), timeout_s=PROMPTS_TIMEOUT_S)
    started, before = time.perf_counter(), sum(generation.stream.count for generation in generations)
    await asyncio.gather(*(_rest(generation) for generation in generations))
    speed = (ROWS * NEW_TOKENS - before) / (time.perf_counter() - started)
    await runtime.close()
    return speed


async def _rest(generation: Generation) -> None:
    async for _ in generation.pieces():
        pass


def _one_by_one(path: Path, prompts: list[list[int]], threads: int) -> float:
    """Tokens per second of the high-level class, prompts not counted; two prompts tell as much as sixteen."""
    use_row_kernels(False)
    llama = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT_TOKENS, n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False
    )
    spent, generated = 0.0, 0
    for prompt in prompts:
        tokens = llama.generate(prompt, temp=0.0)
        next(tokens)
        started = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            next(tokens)
        spent += time.perf_counter() - started
        generated += NEW_TOKENS - 1
        tokens.close()
    llama.close()
    return generated / spent


def quantized_folder(model: Path, folder: Path, scheme: str) -> Path:
    """A complete bundle folder of the model folder `model`, its weights quantized by llama.cpp to `scheme`."""
    system_info()
    shutil.copytree(model, folder)
    Bundle.from_folder(folder, lineage=Lineage(operation="import", code_revision="benchmark")).write_parts(folder)
    f16, params = folder / "f16.gguf", llama_cpp.llama_model_quantize_default_params()
    convert_to_gguf(folder, f16, dtype="F16")
    params.ftype = FILE_TYPES[scheme]
    assert llama_cpp.llama_model_quantize(str(f16).encode(), str(folder / GGUF_FILE).encode(), params) == 0
    for path in (f16, *folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    return folder
