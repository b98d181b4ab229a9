"""System call numbers per architecture, read from the checked-in table `syscalls.txt` beside this file."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

AUDIT_ARCHITECTURES: Final[Mapping[str, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's own number of each architecture whose table is checked in."""


@functools.cache
def numbers(architecture: str = "") -> Mapping[str, int]:
    """Name to number for `architecture` (default: this machine's); a call that it does not have is absent."""
    architecture = architecture or platform.machine()
    lines = Path(__file__).with_name("syscalls.txt").read_text(encoding="ascii").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    column = rows[0].index(architecture)
    return {row[0]: int(row[column]) for row in rows[1:] if row[column] != "-"}
