"""Where the time of one training step goes on a GPU: torch's profiler by operation and by kernel, printed and saved.

    python -m benchmarks.gpu.step_profile [CASE ...] [--save NAME]      cases: those of benchmarks.gpu.train

Times of kernels are their own; `idle_ms` is what the step takes beyond all of them, and is not negative unless kernels
ran beside each other. The profiled step is not the timed one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import results
from benchmarks.gpu import contenders
from benchmarks.gpu.shapes import TOKENS
from benchmarks.gpu.train import CASES, sustained_tflops

WARM_STEPS, TIMED_STEPS, SHOWN = 6, 8, 45


def measure(case: str) -> dict[str, Any]:
    """The row of a case: time of a step, of its kernels, and the largest of both tables, in ms of one step."""
    facts = CASES[case]
    step = contenders.ours(facts["shape"], facts["method"], facts.get("state", "float32"))
    generator = torch.Generator("cuda").manual_seed(2)

    def tokens() -> torch.Tensor:
        return torch.randint(0, 512, (facts["sequences"], TOKENS), device="cuda", generator=generator)

    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        drawn = tokens()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(drawn)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    drawn = tokens()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        step(drawn)
        torch.cuda.synchronize()
    kernels = [each for each in found.key_averages() if each.device_type == DeviceType.CUDA]
    operations = [
        (f"{each.key} {_brief(each.input_shapes)}", each)
        for each in found.key_averages(group_by_input_shape=True)
        if each.device_type == DeviceType.CPU
    ]
    busy_ms = sum(each.self_device_time_total for each in kernels) / 1e3
    took_ms = statistics.median(times[WARM_STEPS:]) * 1e3
    return {
        "case": case,
        "step_ms": took_ms,
        "kernels_ms": busy_ms,
        "idle_ms": took_ms - busy_ms,
        "launches": sum(each.count for each in kernels),
        "operations": _largest(operations),
        "kernels": _largest([(each.key[:120], each) for each in kernels]),
    }


def _largest(events: list[tuple[str, Any]]) -> list[list[Any]]:
    """Rows of [ms, count, name], the longest first."""
    rows = [[each.self_device_time_total / 1e3, each.count, name] for name, each in events]
    return sorted((row for row in rows if row[0] > 0), reverse=True)[:SHOWN]


def _brief(shapes: list[Any]) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes if shape)[:90]


def main() -> None:
    """Profiles the named cases, each printed as two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=["7B-qlora", "7B-lora"])
    parser.add_argument("--save", default="step_profile_gpu")
    options = parser.parse_args()
    rows = []
    for case in options.cases:
        row = measure(case)
        rows.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
        for table in ("operations", "kernels"):
            print(*(f"  {ms:9.3f} ms {count:5d}  {name}" for ms, count, name in row[table]), sep="\n", flush=True)
        torch.cuda.empty_cache()
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    results.save(options.save, rows, sustained_tflops=sustained_tflops(), **facts)


if __name__ == "__main__":
    main()
