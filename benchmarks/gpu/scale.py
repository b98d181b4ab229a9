"""Training on two GPUs of one machine against one, by the trainer's own step: tokens/s, memory of each, equal losses.

    python -m benchmarks.gpu.scale [CASE ...] [--layouts NAME ...]     cases: those of CASES; layouts: those of LAYOUTS

Where each GPU takes packs of its own, `data`, it takes as many sequences as the one alone does, with weights given away
between forward and backward pass (`regathers`) or kept; in the other layouts both work on one pack. First all train on
the same tokens, in packs of the same size, and their losses are compared; then they are timed with one pack for each
GPU, or for both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, Final

import torch

from benchmarks import results
from benchmarks.gpu import contenders
from benchmarks.gpu.shapes import TOKENS
from services.trainer.parallel.places import Place
from services.trainer.parallel.ranks import joined

GPUS: Final = 2
CASES: Final[dict[str, dict[str, Any]]] = {
    "7B-lora": {"shape": "7B", "method": "lora", "sequences": 4},
    "1.5B-full": {"shape": "1.5B", "method": "full", "sequences": 4},
    "7B-qlora": {"shape": "7B", "method": "qlora", "sequences": 4},
    "1.5B-long": {"shape": "1.5B", "method": "full", "sequences": 1, "tokens": 4 * TOKENS},
}
LAYOUTS: Final[dict[str, dict[str, Any]]] = {
    "data": {}, "kept": {"regathers": False}, "tensor": {"tensor": GPUS}, "context": {"context": GPUS},
}  # fmt: skip
"""What of `regathers`, `tensor` and `context` is not as in a training of one process."""
COMPARED_STEPS, WARM_STEPS, TIMED_STEPS = 20, 3, 10


def measure(case: str, rank: int, count: int, layout: dict[str, Any], rendezvous: str) -> dict[str, Any]:
    """What one of `count` processes measures: losses of the first steps, then the median time of a step."""
    torch.cuda.set_device(rank)
    facts = CASES[case]
    here = Place(rank=rank, count=count, local_rank=rank, local_count=count)
    with joined(here, "cuda", meeting=f"file://{rendezvous}") as met:
        ranks = replace(met, tensor=layout.get("tensor", 1), context=layout.get("context", 1))
        regathers = layout.get("regathers", True)
        step = contenders.ours(facts["shape"], facts["method"], ranks=ranks, regathers=regathers)
        generators = [torch.Generator("cuda").manual_seed(2 + number) for number in range(GPUS)]
        shape = (facts["sequences"], facts.get("tokens", TOKENS))

        def tokens(number: int) -> torch.Tensor:
            return torch.randint(0, 512, shape, device="cuda", generator=generators[number])

        mine = ranks.share(range(GPUS))
        losses = [step(*(tokens(number) for number in mine)) for _ in range(COMPARED_STEPS)]
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(WARM_STEPS + TIMED_STEPS):
            drawn = tokens(mine[0])
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step(drawn)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        took = statistics.median(times[WARM_STEPS:])
        return {
            "step_ms": took * 1e3,
            "tokens_per_second": ranks.replicas * shape[0] * shape[1] / took,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "losses": losses,
        }


def run(case: str, count: int, layout: str = "") -> dict[str, Any]:
    """The row of a case on that many GPUs, each in a process of its own; the slowest of them counts."""
    given = LAYOUTS.get(layout, {})
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(max_workers=count, mp_context=get_context("spawn")) as pool,
    ):
        jobs = [pool.submit(measure, case, rank, count, given, f"{folder}/rendezvous") for rank in range(count)]
        found = [job.result() for job in jobs]
    told = {"case": case, "gpus": count, "layout": layout, "regathers": given.get("regathers", True)}
    return {**told, **max(found, key=lambda each: each["step_ms"])}


def main() -> None:
    """Runs the named cases, or all, and saves what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["7B-lora", "1.5B-full", "7B-qlora"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["data", "kept"])
    parser.add_argument("--save", default="train_two_gpus")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        one, *others = (run(case, 1), *(run(case, GPUS, layout) for layout in options.layouts))
        for two in others:
            two["speed_ratio"] = two["tokens_per_second"] / one["tokens_per_second"]
            two["memory_ratio"] = two["peak_gib"] / one["peak_gib"]
            pairs = zip(one["losses"], two["losses"], strict=True)
            two["largest_loss_difference"] = max(abs(a - b) / a for a, b in pairs)
        rows += [one, *others]
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        results.save(options.save, rows, **facts)
        for row in (one, *others):
            print({key: value for key, value in row.items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()
