"""Quantization by llama.cpp's own quantizer, in a process of its own, held against the forecast tensor by tensor."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from smeltkit import limits
from smeltkit.errors import DiskFull, QuantizationMismatch, Timeout
from smeltkit.exits import REFUSED, check_exit
from smeltkit.ml.arch import ModelConfig
from smeltkit.ml.gguf_io import GgufFile
from smeltkit.ml.quantization import planned_size_bytes, planned_types, scheme_of

SIZE_TOLERANCE = 0.05
"""Share by which the tensors' stored size may differ from the forecast."""
_POLL_S = 0.1


def quantize(
    source: Path, target: Path, config: ModelConfig, scheme: str, *, threads: int, progress: Callable[[int], None]
) -> None:
    """Writes the GGUF file `source` (F32, F16 or BF16) to `target` under `scheme`, and verifies what came out.

    `progress` gets bytes written so far and may raise to stop. QuantizationMismatch if a tensor's type or the size is
    not what was forecast, or if llama.cpp refuses; Timeout after QUANTIZE_TIMEOUT_S; DiskFull.
    """
    types = planned_types(config, scheme)
    _run(source, target, scheme_of(scheme).file_type, threads, progress)
    verify(GgufFile.open(target), types, planned_size_bytes(config, scheme), scheme)


def verify(stored: GgufFile, types: dict[str, str], size_bytes: int, scheme: str) -> None:
    """Raises QuantizationMismatch, listing tensors, unless types and size are as forecast."""
    actual = {name: info.dtype for name, info in stored.tensors.items()}
    wrong = [
        f"{name} is {actual.get(name, 'missing')} instead of {types.get(name, 'absent')}"
        for name in sorted(types.keys() | actual.keys())
        if types.get(name) != actual.get(name)
    ]
    if wrong:
        raise QuantizationMismatch(
            f"{scheme} was requested, but {len(wrong)} of {len(types)} tensors are stored otherwise:"
            f" {'; '.join(wrong[:5])}"
        )
    stored_bytes = sum(info.size_bytes for info in stored.tensors.values())
    if abs(stored_bytes - size_bytes) > SIZE_TOLERANCE * size_bytes:
        raise QuantizationMismatch(
            f"{scheme} gave {stored_bytes} bytes of tensors where {size_bytes} were forecast; they may differ by"
            f" {SIZE_TOLERANCE:.0%}"
        )


def _run(source: Path, target: Path, file_type: int, threads: int, progress: Callable[[int], None]) -> None:
    command = [sys.executable, "-m", "services.importer.quantize_process", str(source), str(target)]
    command += [str(file_type), str(threads or len(os.sched_getaffinity(0)))]
    log = target.with_suffix(".log")
    deadline = time.monotonic() + limits.QUANTIZE_TIMEOUT_S
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise Timeout(f"the quantization needed more than {limits.QUANTIZE_TIMEOUT_S / 3600:g} h")
                progress(target.stat().st_size if target.exists() else 0)
                time.sleep(_POLL_S)
        finally:
            process.kill()
            process.wait()
    said = log.read_text(errors="replace")
    if process.returncode and ("no space" in said.lower() or _is_full(target.parent)):
        raise DiskFull(f"no space is left for the quantized file {target.name}; free some and try again")
    check_exit("llama.cpp's quantizer", process.returncode, {REFUSED: QuantizationMismatch}, said)


def _is_full(folder: Path) -> bool:
    return os.statvfs(folder).f_bavail == 0
