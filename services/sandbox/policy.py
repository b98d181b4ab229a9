"""What a run may use, and what a level guarantees.

Not promised at any level: side channels between neighbours, kernel bugs below `guest-kernel`, secrecy of what the test
itself passes to the candidate. At `rootless` and `confined` memory is bounded by address space and sampling, so a tree
can pass its limit for one sampling period.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Final

from smeltkit.errors import BadCode, BadConfig
from smeltkit.limits import GIB, KIB, MIB


class Level(enum.IntEnum):
    """Isolation, weakest first."""

    CONFINED = 1
    """No namespaces: Landlock, seccomp without process creation, rlimits."""
    ROOTLESS = 2
    """All namespaces, a root of its own, seccomp; one host uid; memory bounded by rlimits and sampling."""
    JAIL = 3
    """As rootless, with host uids of the slot's own and cgroups around the whole tree."""
    GUEST_KERNEL = 4
    """The best of the others that works there, under a kernel that is not the node's (gVisor, Kata)."""

    @classmethod
    def named(cls, name: str) -> Level:
        """The level called `name`; BadConfig otherwise."""
        try:
            return cls[name.upper().replace("-", "_")]
        except KeyError:
            raise BadConfig(f"isolation level {name!r} is unknown; choose one of {', '.join(LEVELS)}") from None

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


LEVELS: Final = tuple(str(level) for level in Level)
PRELOAD: Final = (
    "bisect",
    "collections",
    "copy",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "string",
    "typing",
)
"""Modules that zygotes import once, because most programs use them."""

CODE_MAX_BYTES: Final = 1 * MIB
TESTS_MAX_BYTES: Final = 1 * MIB
STDIN_MAX_BYTES: Final = 8 * MIB
DETAIL_MAX_CHARS: Final = 500
HEAD_MAX_BYTES: Final = 64 * KIB
"""Of each stream that a record keeps."""
FILE_BYTES: Final = 16 * MIB
TMP_INODES: Final = 4096
JUDGE_EXTRA_CPU_S: Final = 5.0
JUDGE_MEMORY_BYTES: Final = 2 * GIB
ADDRESS_SPACE_EXTRA_BYTES: Final = {True: 512 * MIB, False: 256 * MIB}
"""On top of memory_bytes, with and without a cgroup."""
ANSWER_EXTRA_S: Final = 1.0
"""A reply comes within wall_s and this."""

_BOUNDS: Final[Mapping[str, tuple[float, float, str]]] = {
    "cpu_s": (0.1, 300, "seconds"),
    "wall_s": (0.1, 900, "seconds"),
    "memory_bytes": (32 * MIB, 16 * GIB, "bytes"),
    "pids": (1, 512, "processes and threads"),
    "output_bytes": (1 * KIB, 16 * MIB, "bytes"),
    "tmp_bytes": (64 * KIB, 1 * GIB, "bytes"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one run; out of range is BadCode, which names field, value and range."""

    cpu_s: float = 10.0
    """CPU seconds of the whole tree."""
    wall_s: float = 35.0
    """Wall-clock seconds; a backstop."""
    memory_bytes: int = 512 * MIB
    """Memory of the whole tree."""
    pids: int = 32
    """Processes and threads."""
    output_bytes: int = 64 * KIB
    """Standard output and error together."""
    tmp_bytes: int = 16 * MIB
    """Size of /tmp."""

    def __post_init__(self) -> None:
        for name, (low, high, unit) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise BadCode(f"limit {name}={value} is out of range; allowed are {low:g} to {high:g} {unit}")

    @classmethod
    def from_request(cls, given: Mapping[str, Any]) -> Limits:
        """Limits from the fields that a request sets; an absent wall_s follows cpu_s."""
        fields = dict(given)
        if "cpu_s" in fields and "wall_s" not in fields:
            fields["wall_s"] = min(3 * fields["cpu_s"] + 5, _BOUNDS["wall_s"][1])
        return cls(**fields)
