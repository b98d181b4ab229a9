"""Writes `constraints-cuda.txt`: what the registry's own torch, the one with CUDA, brings beside `constraints.txt`.

    python -m scripts.cuda_pins     # after another torch or triton in constraints.txt; installs nothing

The build for CPUs asks for none of it, so what is installed on a machine without a GPU cannot tell whether the two
files agree. pip resolves the registry's build under `constraints.txt`, and refuses what does not fit it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[1]
PINS, CUDA_PINS = ROOT / "constraints.txt", ROOT / "constraints-cuda.txt"
SHARED: Final = ("torch", "triton")
"""In both files: pip refuses to install under both unless they agree."""
_HEADER = "# What torch with CUDA brings beside constraints.txt, from the registry: python -m scripts.cuda_pins\n"


def pins_of(path: Path) -> dict[str, str]:
    """Versions by canonical name, of a file of `name==version` lines."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def main() -> int:
    """Exit status: pip's, if it refuses."""
    pinned = pins_of(PINS)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    # `===` is the registry's own build: one for CPUs has a local version behind it.
    command += ["--constraint", str(PINS), f"torch==={pinned['torch']}"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if told.returncode:
        return told.returncode
    brought = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in json.loads(told.stdout)["install"]
    }
    kept = {name: found["version"] for name, found in brought.items() if name in SHARED or name not in pinned}
    CUDA_PINS.write_text(_HEADER + "".join(f"{name}=={kept[name]}\n" for name in sorted(kept)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
