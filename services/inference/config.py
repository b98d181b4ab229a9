"""Settings of the inference service."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import BadConfig
from smeltkit.ids import check_digest

MEMORY_SHARE = 0.6
KERNELS = ("auto", "llama.cpp")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Prefix `SMELT_INFERENCE_`."""

    cache_dir: Path = Path(".smelt/cache/inference")
    """Folder of fetched bundles and converted weights."""
    cache_bytes: int = 20 * limits.GIB
    """Bytes that the cache folder may take, except for what is in use."""
    memory_bytes: int = 0
    """Bytes that all loaded models together may take; 0 for 60 % of the machine's memory."""
    kv_bytes: int = 512 * limits.MIB
    """Bytes of a model's key-value memory. It bounds the tokens held at once, and a context longer than that."""
    slots: int = 16
    """Requests of one model that run at once, 1 to 256; others wait."""
    batch_rows: int = 1024
    """Tokens computed in one step at most, 16 to 8192: more is faster on long prompts, and slower to react."""
    step_ms: float = 400.0
    """Milliseconds that prompts may make a step last while others stream, by the pace measured so far."""
    threads: int = 0
    """Threads that compute; 0 for as many as there are cores."""
    kernels: str = "auto"
    """Products of quantized weights: `auto` is ours where the CPU has AVX-512 VNNI, `llama.cpp` is upstream's alone."""
    waiting_max: int = 1024
    """Requests of one model that may wait; more are refused."""
    flush_ms: float = 10.0
    """Milliseconds that tokens of a stream may wait for company; the first is sent at once."""
    idle_unload_s: float = 1800.0
    """Seconds without a request after which a model is unloaded; 0 for never."""
    models: tuple[str, ...] = ()
    """Digests of bundles, separated by commas, that are loaded at the start and kept; ready is who has them all."""
    strict: bool = False
    """Whether anything slower or weaker than asked for is refused instead of announced."""

    def __post_init__(self) -> None:
        _check("slots", self.slots, 1, limits.SLOTS_MAX)
        _check("batch_rows", self.batch_rows, 16, 8192)
        _check("step_ms", self.step_ms, 1, 60_000)
        _check("threads", self.threads, 0, 1024)
        if self.kernels not in KERNELS:
            raise BadConfig(f"kernels={self.kernels!r} is not known; allowed: {', '.join(KERNELS)}")
        _check("waiting_max", self.waiting_max, 1, 1_000_000)
        _check("flush_ms", self.flush_ms, 0, 10_000)
        _check("idle_unload_s", self.idle_unload_s, 0, 30 * 86400)
        _check("memory_bytes", self.memory_bytes, 0, 1 << 50)
        _check("kv_bytes", self.kv_bytes, limits.MIB, 1 << 50)
        for digest in self.models:
            check_digest(digest)
        _check("cache_bytes", self.cache_bytes, limits.MIB, 1 << 60)

    @property
    def memory_budget_bytes(self) -> int:
        """`memory_bytes` with its default filled in."""
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return self.memory_bytes or int(MEMORY_SHARE * physical)

    @property
    def is_upstream(self) -> bool:
        """Whether upstream's kernels alone compute."""
        return self.kernels == "llama.cpp"

    @property
    def thread_count(self) -> int:
        """`threads` with its default filled in: the cores this process may use."""
        return self.threads or len(os.sched_getaffinity(0))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadConfig(f"{name}={value} is out of range; allowed: {low} to {high}")
