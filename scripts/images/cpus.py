"""Whether one image computes on every CPU: its llama.cpp under emulated processors, and on this machine's own.

The emulation (qemu-user) knows processors up to AVX2. What is picked is what the processor can, and a batch of a random
model agrees with single rows: `scripts/llama/prove_decode.py`, run with the image's Python and libraries. On this
machine each library of the image that its CPU can run is also made to compute, in place of the best.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from scripts.images.catalogue import ROOT
from smeltkit.errors import BadConfig

KINDS = {
    "Nehalem": ({"SSSE3"}, {"AVX", "AVX2"}),
    "SandyBridge": ({"SSSE3"}, {"AVX2"}),
    "Haswell-noTSX": ({"AVX2"}, {"AVX512"}),
}
"""Emulated processors: what must be used there, and what must not."""
HERE = "this machine"
OUR_KERNELS = "with and without our kernels"
"""What the proof says where it computed by them too."""
NOT_HERE = "does not run on this CPU"
"""What the proof says of a library that the CPU cannot run."""
_PROOF = ROOT / "scripts" / "llama" / "prove_decode.py"
_CHOSEN = f"""
import runpy
from services.inference.llama import system_info
system_info()
runpy.run_path({str(_PROOF)!r}, run_name="__main__")
"""
_NEEDED_BY_OURS = "AVX512_VNNI"
_TIMEOUT_S = 300


def rows(root: Path) -> list[dict[str, Any]]:
    """A row a processor and library for the image mounted at `root`: what is used, and what is wrong."""
    if shutil.which("qemu-x86_64") is None:
        raise BadConfig("qemu-x86_64 is not installed; install it (Debian: apt-get install qemu-user)")
    python = str(root / "usr/bin/python3")
    loader = [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", _library_path(root), python]
    (libraries,) = root.glob("opt/smelt/lib/python3*/site-packages/llama_cpp/lib")
    names = sorted(path.name for path in libraries.glob("libggml-cpu-*.so"))
    return [
        *(
            _row(kind, ["qemu-x86_64", "-cpu", kind, "-L", str(root), python, "-c", _CHOSEN], root, *bounds)
            for kind, bounds in KINDS.items()
        ),
        _row(HERE, [*loader, "-c", _CHOSEN], root, set(), set()),
        *(_row(HERE, [*loader, str(_PROOF), name], root, set(), set(), library=name) for name in names),
    ]


def _row(
    cpu: str, command: list[str], root: Path, wanted: set[str], unwanted: set[str], *, library: str = "chosen"
) -> dict[str, Any]:
    (packages,) = root.glob("opt/smelt/lib/python3*/site-packages")
    done = subprocess.run(
        command,
        env={"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"},
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    if library != "chosen" and NOT_HERE in done.stderr:
        return {"cpu": cpu, "library": library, "uses": NOT_HERE, "our_kernels": False, "wrong": []}
    told = re.search(r"it uses (.*)", done.stdout)
    used = set(told[1].split(", ")) if told else set()
    wrong = [] if done.returncode == 0 else [done.stderr.strip()[-300:] or f"ended with {done.returncode}"]
    wrong += [f"{feature} is not used" for feature in sorted(wanted - used) if told]
    wrong += [f"{feature} is used" for feature in sorted(unwanted & used)]
    has_ours = OUR_KERNELS in done.stdout
    if told and has_ours != (_NEEDED_BY_OURS in used):
        wrong.append(f"our kernels compute: {has_ours}; they are for CPUs with {_NEEDED_BY_OURS}")
    return {"cpu": cpu, "library": library, "uses": ", ".join(sorted(used)), "our_kernels": has_ours, "wrong": wrong}


def _library_path(root: Path) -> str:
    return ":".join(str(root / place) for place in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
