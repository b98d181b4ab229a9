"""The device of a training, set up so that the same run gives the same numbers again."""

from __future__ import annotations

import statistics
import time
from typing import Final

import torch

from services.trainer.parallel.devices import too_many
from smeltkit.config import default_environment
from smeltkit.errors import BadConfig

_CUBLAS: Final = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Without a workspace of fixed size cuBLAS is not deterministic, and torch refuses its products."""
_PRODUCT_SIZE: Final = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the product by which a device's rate is told."""


def prepare_device(threads: int, rank: int = 0, processes: int = 1, memory_bytes: int = 0) -> str:
    """`cuda` or `cpu`, with as many threads (0: as many as torch takes); to be called before the first operation.

    Of several processes each takes the GPU of its rank; BadConfig if there are too few. Tensors beyond `memory_bytes`
    of it, unless that is 0, are an error of torch's for want of memory.
    """
    default_environment(_CUBLAS)
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling what nothing reads takes 4 % of a training step on a GPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        return "cpu"
    if processes > torch.cuda.device_count():
        raise BadConfig(too_many(processes, torch.cuda.device_count(), "GPUs"))
    torch.cuda.set_device(rank)
    if memory_bytes:
        torch.cuda.set_per_process_memory_fraction(
            min(memory_bytes / torch.cuda.get_device_properties(rank).total_memory, 1.0)
        )
    return "cuda"


def matrix_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on the device: the median of five, after two to warm up.

    Its numbers are drawn from a generator of its own, so that no random state of a training moves.
    """
    size = _PRODUCT_SIZE[device]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(times[2:])


def device_name(device: str) -> str:
    """What the device is called, for records: a GPU by its name, a CPU by its number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
