"""System call numbers per architecture, read from the checked-in table `syscalls.txt` beside this file."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Final

AUDIT_ARCHITECTURES: Final[Mapping[str, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's own number of each architecture whose table is checked in."""


@functools.cache
def numbers(architecture: str = "") -> Mapping[str, int]:
    """Name to number for `architecture` (default: this machine's); a call that it does not have is absent."""
    architecture = architecture or os.uname().machine
    with open(os.path.join(os.path.dirname(__file__), "syscalls.txt"), encoding="ascii") as file:
        rows = [line.split() for line in file if not line.startswith("#")]
    column = rows[0].index(architecture)
    return {row[0]: int(row[column]) for row in rows[1:] if row[column] != "-"}
