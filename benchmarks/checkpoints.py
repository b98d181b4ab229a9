"""How long a checkpoint stops a training: written in the background, as a run does it, against waited for.

    python -m benchmarks.checkpoints [--rounds N] [--device cuda]

A model of 12 million parameters, on a GPU of 124 million, trains in full in one process; state and copies are float32.
In each round the loop does the same steps three times, in turn first: without a checkpoint, with one that it waits for,
and with one that is written while it goes on. The stop is what the call takes; the loss of the whole loop beside the
one without holds also what the writing thread takes of the processors.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import results
from services.trainer.costs.peak import PeakMemory
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.order import Order
from services.trainer.data.samples import Sample
from services.trainer.optim.schedule import Schedule
from services.trainer.run.loop import Run, StepReport
from services.trainer.settings.training import TrainSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.kernels import kernels_for
from smeltkit.testing.tiny_models import tiny_config

NAMES = {"cpu": "checkpoints", "cuda": "checkpoints_gpu"}
SHAPES = {
    "cpu": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4},
    "cuda": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12},
}  # fmt: skip
STEPS, TOKENS = 6, 256
TARGET = 0.5
"""What a stop may be at most of one that is waited for."""


def main() -> int:
    """Exit status: 0 if the stop is short enough."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    rounds, device = (options := parser.parse_args()).rounds, options.device
    with tempfile.TemporaryDirectory(prefix="smelt-checkpoints-") as folder:
        run = _run(Path(folder), 3 * STEPS * (rounds + 1), device)
        steps = run.steps()
        ways: dict[str, Callable[[], None]] = {"none": lambda: None, "waited": run.save, "background": run.start_saving}
        measured: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way in np.roll(list(ways), number):
                stop_s, loop_s = _loop(steps, ways[way])
                begin = time.monotonic()
                run.wait_for_saving()
                measured[str(way)].append((stop_s, loop_s, time.monotonic() - begin))
        size_bytes = sum(path.stat().st_size for path in max(Path(folder).glob("step-*")).iterdir())
        parameters = run.decoder.config.parameters
    rows = [
        {
            "checkpoint": way,
            "stop_ms": 1e3 * statistics.median(stop for stop, _, _ in found[1:]),
            f"loop_of_{STEPS}_ms": 1e3 * statistics.median(loop for _, loop, _ in found[1:]),
            "left_to_wait_ms": 1e3 * statistics.median(left for _, _, left in found[1:]),
        }
        for way, found in measured.items()
    ]
    stops = {way: [stop for stop, _, _ in found[1:]] for way, found in measured.items()}
    loops = {way: [loop for _, loop, _ in found[1:]] for way, found in measured.items()}
    ratio = results.median_ratio(stops["background"], stops["waited"])
    losses = {way: statistics.median(one - none for one, none in zip(loops[way], loops["none"], strict=True)) * 1e3
              for way in ("waited", "background")}  # fmt: skip
    print(results.table(rows))
    print(f"stop, background to waited: {ratio:.3f}; loop longer by {losses} ms; {size_bytes / 2**20:.0f} MiB each")
    results.save(
        NAMES[device], rows, torch=torch.__version__, **_gpu(device), parameters=parameters,
        checkpoint_bytes=size_bytes, rounds=rounds, stop_ratio=ratio, loop_longer_ms=losses, target=TARGET,
    )  # fmt: skip
    return int(ratio > TARGET)


def _loop(steps: Iterator[StepReport], save: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the call after the first step, and of all steps with it."""
    begin = time.monotonic()
    next(steps)
    stop = time.monotonic()
    save()
    stop_s = time.monotonic() - stop
    for _ in range(STEPS - 1):
        next(steps)
    return stop_s, time.monotonic() - begin


def _gpu(device: str) -> dict[str, str]:
    return {"device": torch.cuda.get_device_name()} if device == "cuda" else {}


def _run(folder: Path, total: int, device: str) -> Run:
    torch.manual_seed(0)
    config = ModelConfig.from_hf({**tiny_config("qwen2"), **SHAPES[device], "vocab_size": 8192})
    draw = np.random.default_rng(0)
    drawn = (draw.integers(0, 8192, TOKENS).astype(np.int32) for _ in range(16))
    samples = [Sample(ids=ids, targets=np.append(ids[1:], np.int32(-100)).astype(np.int32)) for ids in drawn]
    settings = TrainSettings(
        method="full", epochs=1000, sequence_tokens=TOKENS, packs_per_step=1, checkpoint_steps=10**9, keep_checkpoints=1
    )
    order = Order(lengths=[TOKENS] * 16, pack_tokens=TOKENS, packs_per_step=1, seed=0)
    return Run(
        Decoder(config, kernels=kernels_for(device)).to(device), samples, Curriculum([(order, total + 1)]),
        Schedule(kind="constant", peak=1e-4, warmup_steps=0, total_steps=total + 1), settings,
        folder=folder, run_digest="sha256:" + "0" * 64, peak=PeakMemory(device),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
