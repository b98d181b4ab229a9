"""Training on one GPU against transformers + peft in the same run: tokens/s, MFU, peak memory, equal losses.

    python -m benchmarks.gpu.train [CASE ...]     cases: cross-entropy, nf4, and those of CASES

MFU is `shapes.flops_per_token` times tokens/s over the device's bf16 rate: the datasheet's 989 TFLOP/s and the rate of
a large matrix product measured here, both shown. Weights, tokens and learning rate are the same on both sides, and the
losses of the first steps are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks import results
from benchmarks.gpu import contenders, trl_peer
from benchmarks.gpu.shapes import SHAPES, TOKENS, flops_per_token
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.kernels import triton_kernels
from smeltkit.ml.kernels.cross_entropy import linear_cross_entropy
from smeltkit.ml.nf4 import quantize
from smeltkit.ml.nf4_layout import stored_bytes

DATASHEET_TFLOPS = 989.0
CASES: dict[str, dict[str, Any]] = {
    "350M-full": {"shape": "350M", "method": "full", "sequences": 16},
    "1.5B-full": {"shape": "1.5B", "method": "full", "sequences": 4},
    "1.5B-lora": {"shape": "1.5B", "method": "lora", "sequences": 8},
    "7B-lora": {
        "shape": "7B", "method": "lora", "sequences": 4,
        "contenders": ("ours", "peer", "peer with Liger", "TRL with Liger", "ours on NF4"),
    },
    "7B-qlora": {
        "shape": "7B", "method": "qlora", "sequences": 4,
        "contenders": ("ours", "peer", "peer with Liger", "TRL", "ours on bf16"),
    },
    "7B-qlora-recomputing": {
        "shape": "7B", "method": "qlora", "sequences": 4, "contenders": ("ours recomputing", "TRL"),
    },
    "1.5B-rounded": {
        "shape": "1.5B", "method": "full", "state": "bfloat16", "sequences": 4,
        "contenders": ("ours", "ours in float32"),
    },
    "1.5B-int8": {
        "shape": "1.5B", "method": "full", "state": "int8", "sequences": 4,
        "contenders": ("ours", "ours in float32"),
    },
    "1.5B-offload": {
        "shape": "1.5B", "method": "full", "state": "offload", "sequences": 4, "compared": 10,
        "contenders": ("ours", "ours in float32"),
    },
    "7B-full": {"shape": "7B", "method": "full", "state": "bfloat16", "sequences": 4},
}  # fmt: skip
WARM_STEPS, COMPARED_STEPS, TIMED_STEPS = 3, 50, 8


def matrix_tflops(size: int = 8192) -> float:
    """bf16 rate of a large matrix product on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats=20) / 1e12


def sustained_tflops(size: int = 8192, seconds: float = 3.0) -> float:
    """The same of products without a pause, over the last third: what is left once the clock follows the power."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    repeats = int(seconds / 3 * 7e14 / (2 * size**3))
    rate = 0.0
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            a @ b
        end.record()
        torch.cuda.synchronize()
        rate = repeats * 2 * size**3 / begin.elapsed_time(end) / 1e9
    return rate


def seconds(work: Callable[[], Any], *, repeats: int, queued: int = 1) -> float:
    """Median time of `work` on the device, after three runs to warm up; of as many as are `queued` without a wait."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(queued):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / queued / 1e3)
    return statistics.median(times)


def cross_entropy(rate: float, sustained: float) -> list[dict[str, Any]]:
    """The fused head and loss, 8K tokens by 152K words: share of both matrix rates, memory beyond inputs and outputs.

    The memory is that of the first call: what is then kept for the next ones counts too.
    """
    rows, tokens, vocab, hidden = [], 8192, 151936, 3584
    for is_frozen in (False, True):
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = (torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) / 60).requires_grad_(not is_frozen)
        targets = torch.randint(0, vocab, (tokens,), device="cuda")

        def fused(x: Any = x, w: Any = w, targets: Any = targets) -> Any:
            x.grad = w.grad = None
            return linear_cross_entropy(x, w, targets, kernels=triton_kernels())

        def plain(x: Any = x, w: Any = w, targets: Any = targets) -> Any:
            x.grad = w.grad = None
            return torch.nn.functional.cross_entropy((x @ w.T).float(), targets, reduction="sum")

        row: dict[str, Any] = {"case": f"cross-entropy {'frozen head' if is_frozen else 'trained head'}"}
        for name, forward in (("ours", fused), ("plain", plain)):
            x.grad = w.grad = None
            x[:1].detach() @ w[:1].detach().T  # what any product takes
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forward().backward()
            outputs = x.numel() * 2 + (0 if is_frozen else w.numel() * 2)
            extra = torch.cuda.max_memory_allocated() - before - outputs
            took = seconds(lambda forward=forward: forward().backward(), repeats=8)
            flops = (4 if is_frozen else 6) * tokens * vocab * hidden
            row |= {
                f"{name}_ms": took * 1e3,
                f"{name}_of_matrix_rate": flops / took / 1e12 / rate,
                f"{name}_of_sustained_rate": flops / took / 1e12 / sustained,
                f"{name}_extra_mib": extra / 2**20,
            }
        rows.append(row | {"ratio": row["plain_ms"] / row["ours_ms"]})
        del x, w, fused, plain
        torch.cuda.empty_cache()
    return rows


def nf4() -> list[dict[str, Any]]:
    """Dequantizing the largest matrix of 7B to bf16: bytes moved a second by those of a large copy, and the peer."""
    values = torch.randn(18944, 3584, device="cuda", dtype=torch.bfloat16) * 0.02
    big = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(big)
    copied = 2 * big.nbytes / seconds(lambda: target.copy_(big), repeats=10)
    stored, dequantize = quantize(values), triton_kernels().dequantize_nf4
    moved = values.nbytes + stored_bytes(stored.size)
    took = seconds(lambda: dequantize(stored, torch.bfloat16), repeats=8, queued=50)
    row = {"case": "nf4", "ours_ms": took * 1e3, "ours_of_copy_rate": moved / took / copied, "copy_gb_s": copied / 1e9}
    if find_spec("bitsandbytes"):
        from bitsandbytes import functional

        theirs = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
        took = seconds(lambda: functional.dequantize_4bit(*theirs), repeats=8, queued=50)
        found = functional.dequantize_4bit(*theirs)
        differing = (found != dequantize(stored, torch.bfloat16)).sum().item() / stored.size
        row |= {"peer_ms": took * 1e3, "ratio": took * 1e3 / row["ours_ms"], "values_that_differ": differing}
    return [row]


def train(case: str, rate: float) -> Iterator[dict[str, Any]]:
    """One row a contender of a case, each measured in a process of its own: Liger patches what it finds.

    Ratios, which all rows get after the last, are to the second contender.
    """
    usual = ("ours", "peer", "peer with Liger") if find_spec("liger_kernel") else ("ours", "peer")
    rows: list[dict[str, Any]] = []
    for name in CASES[case].get("contenders", usual):
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            rows.append({"case": case, "contender": name, **pool.submit(contend, case, name, rate).result()})
        print({key: value for key, value in rows[-1].items() if key != "losses"}, flush=True)
        yield rows[-1]
    theirs = rows[1]
    for row in rows:
        if "error" not in row and "error" not in theirs:
            row["speed_ratio"] = row["tokens_per_second"] / theirs["tokens_per_second"]
            row["memory_ratio"] = row["peak_gib"] / theirs["peak_gib"]
            pairs = zip(row["losses"], theirs["losses"], strict=True)
            row["largest_loss_difference"] = max(abs(a - b) / b for a, b in pairs)
    of = {row["contender"]: row for row in rows}
    for quantized, plain in (("ours", "ours on bf16"), ("ours on NF4", "ours")):
        if quantized in of and plain in of:
            of[quantized]["speed_ratio_to_lora"] = of[quantized]["tokens_per_second"] / of[plain]["tokens_per_second"]


def contend(case: str, name: str, rate: float) -> dict[str, Any]:
    """What one contender of a case measures."""
    facts = CASES[case]
    shape, method, state = facts["shape"], facts["method"], facts.get("state", "float32")
    flops = flops_per_token(ModelConfig.from_hf(SHAPES[shape]), is_lora=method != "full")

    def make() -> contenders.Step:
        if name.startswith("ours"):
            is_plain = name == "ours in float32"
            return contenders.ours(
                shape,
                {"ours on bf16": "lora", "ours on NF4": "qlora"}.get(name, method),
                "float32" if is_plain else state,
                recomputes=name.endswith("recomputing"),
            )
        return contenders.peer(shape, method, state, with_liger=name.endswith("Liger"))

    try:
        if name.startswith("TRL"):
            return measure_trl(shape, method, facts["sequences"], flops, rate, with_liger=name.endswith("Liger"))
        return measure(make, facts["sequences"], flops, rate, facts.get("compared", COMPARED_STEPS))
    except Exception as error:  # what a peer's library fails with is its row, and no end of the others
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def measure(
    make: Callable[[], contenders.Step], sequences: int, flops: float, rate: float, compared: int
) -> dict[str, Any]:
    """Losses of the first steps, then the median time of a step on fresh tokens."""
    torch.cuda.reset_peak_memory_stats()
    step, tokens = make(), draws(sequences)
    losses = [step(tokens()) for _ in range(compared)]
    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        drawn = tokens()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(drawn)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return found(sequences, losses, statistics.median(times[WARM_STEPS:]), flops, rate)


def measure_trl(
    shape: str, method: str, sequences: int, flops: float, rate: float, *, with_liger: bool
) -> dict[str, Any]:
    """The same of TRL, which has the loop in its own hands."""
    torch.cuda.reset_peak_memory_stats()
    tokens, steps = draws(sequences), COMPARED_STEPS + WARM_STEPS + TIMED_STEPS
    rows = torch.cat([tokens() for _ in range(steps)])
    losses, times = trl_peer.measure(shape, rows, sequences, method=method, with_liger=with_liger)
    return found(sequences, losses[:COMPARED_STEPS], statistics.median(times[-TIMED_STEPS:]), flops, rate)


def draws(sequences: int) -> Callable[[], torch.Tensor]:
    """Gives the tokens of one step after another, the same ones to every contender."""
    generator = torch.Generator("cuda").manual_seed(2)
    # Few distinct words, so that there is something to learn and the curves say something.
    return lambda: torch.randint(0, 512, (sequences, TOKENS), device="cuda", generator=generator)


def found(sequences: int, losses: list[float], took: float, flops: float, rate: float) -> dict[str, Any]:
    """A contender's numbers from its losses and the median seconds of a step."""
    speed = sequences * TOKENS / took
    return {
        "step_ms": took * 1e3,
        "tokens_per_second": speed,
        "mfu_datasheet": speed * flops / DATASHEET_TFLOPS / 1e12,
        "mfu_measured": speed * flops / rate / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": losses,
    }


def main() -> None:
    """Runs the named cases, or all, and saves what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["cross-entropy", "nf4", *CASES])
    parser.add_argument("--save", default="train_gpu")
    options = parser.parse_args()
    rate, sustained = matrix_tflops(), sustained_tflops()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 matrix product {rate:.0f} TFLOP/s,"
        f" {sustained:.0f} without a pause", flush=True,
    )  # fmt: skip
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "matrix_tflops": rate,
             "sustained_tflops": sustained}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        found: Iterable[dict[str, Any]]
        if case == "cross-entropy":
            found = cross_entropy(rate, sustained)
        else:
            found = nf4() if case == "nf4" else train(case, rate)
        for row in found:
            rows.append(row)
            results.save(options.save, rows, **facts)
        results.save(options.save, rows, **facts)
    for row in rows:
        print(*(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
                if key != "losses"), sep="  ")  # fmt: skip


if __name__ == "__main__":
    main()
