"""What this machine is, as far as it decides how long a candidate takes."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path


@functools.cache
def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """Architecture and model of the CPU, e.g. "x86_64 AMD EPYC 9B14 25/17/1"; equal on machines of equal speed."""
    text = path.read_text() if path.is_file() else ""
    known = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text.split("\n\n")[0], re.MULTILINE))
    numbers = "/".join(known[name] for name in ("cpu family", "model", "stepping") if name in known)
    part = f"{known.get('CPU implementer', '')} {known.get('CPU part', '')}".strip()
    return " ".join(word for word in (platform.machine(), known.get("model name", part), numbers) if word)
