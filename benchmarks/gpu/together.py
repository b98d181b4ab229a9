"""Three LoRA adapters trained on one base in memory against three trainings of their own, on one GPU, in one run.

    python -m benchmarks.gpu.together [SHAPE] [--sequences N]

Every contender is a process of its own. `alone` is one adapter on its own base, once for each; `at once` is the three
of them at the same time on this GPU, where they fit; `together` is one base with the three taking turns. Memory of the
separate ones is the sum of their peaks. Their speed is told in both ways that one GPU allows: one after the other (all
tokens by all seconds), and at once (the sum of what each does). Weights, tokens, ranks and rates are the same for all,
and the losses of every adapter are compared with those it has alone before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.gpu.contenders import full_pack, random_state
from benchmarks.gpu.shapes import SHAPES, TOKENS
from services.trainer.adapters.attach import attach
from services.trainer.adapters.turns import Turns
from services.trainer.optim.optimizer import Optimizer
from services.trainer.run.step import train_step
from services.trainer.settings.training import AdamSettings, LoraSettings
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.decoder import Decoder
from smeltkit.ml.kernels import triton_kernels

ADAPTERS = ((16, 2e-4), (32, 1e-4), (64, 5e-5))
"""Rank and learning rate of each."""
COMPARED_STEPS, WARM_STEPS, TIMED_STEPS = 30, 3, 12
Step = Callable[[], float]


def base(shape: str) -> Decoder:
    """A frozen bf16 base with the same random weights in every process."""
    config = ModelConfig.from_hf(SHAPES[shape])
    with torch.device("meta"):
        decoder = Decoder(config, kernels=triton_kernels())
    decoder.load_state_dict(random_state(config, 0), assign=True)
    return decoder


def adapter_step(decoder: Decoder, number: int, sequences: int) -> Step:
    """The step of one adapter, attached now, on tokens of its own."""
    rank, rate = ADAPTERS[number]
    torch.manual_seed(number)
    attach(decoder, LoraSettings(rank=rank, alpha=2 * rank))
    optimizer = Optimizer(decoder.named_parameters(), AdamSettings())
    generator = torch.Generator("cuda").manual_seed(100 + number)

    def step() -> float:
        # Few distinct words, so that there is something to learn.
        drawn: Tensor = torch.randint(0, 512, (sequences, TOKENS), device="cuda", generator=generator)
        return train_step(decoder, optimizer, [full_pack(drawn)], learning_rate=rate, clip_norm=1.0).loss

    return step


def alone(shape: str, sequences: int, number: int, gate: Barrier | None = None) -> dict[str, Any]:
    """One adapter on a base of its own; with a `gate` it is timed while the others are."""
    try:
        return measure([adapter_step(base(shape), number, sequences)], sequences, gate)
    except BaseException:
        if gate is not None:
            gate.abort()
        raise


def together(shape: str, sequences: int) -> dict[str, Any]:
    """All adapters on one base, in turns, as a joint training takes them."""
    decoder = base(shape)
    steps = []
    for number in range(len(ADAPTERS)):
        step = adapter_step(decoder, number, sequences)
        turns = Turns(decoder)

        def in_turn(step: Step = step, turns: Turns = turns) -> float:
            with turns.turn():
                return step()

        steps.append(in_turn)
    return measure(steps, sequences)


def measure(steps: list[Step], sequences: int, gate: Barrier | None = None) -> dict[str, Any]:
    """Losses of the first rounds, a step of each adapter in every one; then the median time of a round."""
    losses = [step() for _ in range(COMPARED_STEPS) for step in steps]
    times = []
    if gate is not None:
        gate.wait(timeout=300)
    for _ in range(WARM_STEPS + TIMED_STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for step in steps:
            step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    took = statistics.median(times[WARM_STEPS:])
    return {
        "round_ms": took * 1e3,
        "tokens_per_second": len(steps) * sequences * TOKENS / took,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": [losses[number :: len(steps)] for number in range(len(steps))],
    }


def separate(shape: str, sequences: int) -> list[dict[str, Any]]:
    """A row an adapter, each in a process of its own, one after the other."""
    rows = []
    for number in range(len(ADAPTERS)):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(alone, shape, sequences, number).result()
        rows.append({"contender": "alone", "rank": ADAPTERS[number][0], **found})
    return rows


def at_once(shape: str, sequences: int) -> dict[str, Any]:
    """The separate trainings at the same time, each timed while all of them run; or why that is not possible."""
    count, context = len(ADAPTERS), get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(max_workers=count, mp_context=context) as pool:
        gate: Any = manager.Barrier(count)
        waiting = [pool.submit(alone, shape, sequences, number, gate) for number in range(count)]
        try:
            found = [one.result() for one in waiting]
        except Exception as error:  # noqa: BLE001
            return {"contender": "at once", "error": f"{type(error).__name__}: {str(error)[:160]}"}
    return {
        "contender": "at once",
        "tokens_per_second": sum(row["tokens_per_second"] for row in found),
        "peak_gib": sum(row["peak_gib"] for row in found),
    }


def judged(joint: dict[str, Any], rows: list[dict[str, Any]], beside: dict[str, Any]) -> dict[str, Any]:
    """What the joint training takes by what the separate ones take."""
    in_row = len(rows) / sum(1 / row["tokens_per_second"] for row in rows)
    pairs = [pair for row, own in zip(rows, joint["losses"], strict=True)
             for pair in zip(row["losses"][0], own, strict=True)]  # fmt: skip
    return {
        "memory_by_sum_of_separate": joint["peak_gib"] / sum(row["peak_gib"] for row in rows),
        "speed_by_separate_in_a_row": joint["tokens_per_second"] / in_row,
        "speed_by_separate_at_once": (
            joint["tokens_per_second"] / beside["tokens_per_second"] if "tokens_per_second" in beside else None
        ),
        "largest_loss_difference": max(abs(a - b) / a for a, b in pairs),
    }


def main() -> None:
    """Measures all contenders and saves what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", default="7B", choices=sorted(SHAPES))
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--save", default="train_together_gpu")
    options = parser.parse_args()
    shape, sequences = options.shape, options.sequences
    rows = separate(shape, sequences)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        joint = {"contender": "together", **pool.submit(together, shape, sequences).result()}
    beside = at_once(shape, sequences)
    joint |= judged(joint, rows, beside)
    found = [{"case": f"{shape}-lora, {sequences} sequences", **row} for row in (joint, *rows, beside)]
    results.save(
        options.save,
        found,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        ranks=[r for r, _ in ADAPTERS],
    )
    for row in found:
        print({key: value for key, value in row.items() if key != "losses"}, flush=True)


if __name__ == "__main__":
    main()
