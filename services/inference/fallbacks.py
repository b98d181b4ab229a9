"""Where something slower or weaker than asked for is used: said as an event, and an error in strict mode (R-011).

the engine's build leaves instructions of this CPU unused     asked once, when the service starts
it was built without our kernels for quantized weights        asked once, when the service starts
weights run in another type than they are stored in           asked at every load
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from smeltkit.errors import SettingsDiffer

log = logging.getLogger(__name__)

FEATURES: Mapping[str, str] = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "bmi2": "BMI2",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_vbmi": "AVX512_VBMI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
}
"""Instructions that matter for speed: as Linux names them, and as llama.cpp's account of its build does."""


KERNELS_FLAG = "avx512_vnni"
"""What our kernels need of a CPU, as Linux names it."""


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What was asked for, what is used instead, and why."""

    requested: str
    effective: str
    cause: str


Announce = Callable[[Fallback], None]


class Fallbacks:
    """Announces fallbacks, or refuses them where `is_strict`."""

    def __init__(self, announce: Announce | None = None, *, is_strict: bool = False) -> None:
        self._announce, self._is_strict = announce, is_strict

    def report(self, found: Iterable[Fallback]) -> None:
        """Logs and announces each; in strict mode SettingsDiffer about the first."""
        for fallback in found:
            what = f"{fallback.effective} instead of {fallback.requested}: {fallback.cause}"
            if self._is_strict:
                raise SettingsDiffer(f"{what}; strict mode allows no fallback, see SMELT_INFERENCE_STRICT")
            log.warning("fallback: %s", what)
            if self._announce is not None:
                self._announce(fallback)


def of_build(cpu: frozenset[str], build: str) -> list[Fallback]:
    """Instructions that `cpu` has and the engine's `build`, by its own account, leaves unused: one fallback or none."""
    used = set(re.findall(r"(\w+) = 1\b", build))
    if "AVX512_VNNI" in used:
        used.add("AVX_VNNI")  # the same products in narrower registers: a build that has the wider ones takes those
    unused = [name for flag, name in FEATURES.items() if flag in cpu and name not in used]
    if not unused:
        return []
    return [
        Fallback(
            requested=f"llama.cpp with {', '.join(unused)}",
            effective="llama.cpp without",
            cause="this build does not use all that the CPU has; `make install` on this machine builds another",
        )
    ]


def of_kernels(cpu: frozenset[str], *, is_wanted: bool, is_used: bool) -> list[Fallback]:
    """Our kernels for quantized weights, wanted on a `cpu` that can run them and not used: one fallback or none."""
    if not is_wanted or is_used or KERNELS_FLAG not in cpu:
        return []
    return [
        Fallback(
            requested="our kernels for quantized weights",
            effective="llama.cpp's own",
            cause="this llama.cpp was built without ours; `make install` on this machine builds another",
        )
    ]


def of_weights(stored: str, used: str) -> list[Fallback]:
    """Weights stored as type `stored` that run as type `used`: one fallback where the two differ."""
    if stored == used:
        return []
    return [
        Fallback(requested=f"weights in {stored}", effective=f"weights in {used}", cause="the engine runs no other")
    ]


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of this CPU, as Linux names them; none where it does not tell."""
    text = path.read_text() if path.is_file() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(flags[1].split() if flags else ())
