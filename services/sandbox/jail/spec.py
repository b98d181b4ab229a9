"""What a zygote is told on its command line: how to build the jail, and what its children become."""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

CONTROL: Final = 3
"""Descriptor of the zygote's socket to its supervisor, and of a child's channel."""
BROOM: Final = 4
"""Descriptor of the broom's socket to the supervisor."""
INNER_UID: Final = 1000
"""User and group id of candidates inside the user namespace."""
CODE: Final = 5
"""Descriptor of the memory file with the interpreter's code, where there is one."""
FDS_OF_CHILD: Final = 4


class JailSpec(NamedTuple):
    """One jail of one slot. A named tuple, because every module that a zygote loads is copied into each candidate."""

    role: str
    """`candidate` or `judge`."""
    namespaces: bool
    """Whether namespaces and a root of its own are built; else Landlock and seccomp alone."""
    own_uids: bool
    """Whether inner 0 and INNER_UID are mapped to host uids of their own (needs host root)."""
    binds: tuple[str, ...]
    """Host paths bound read-only at the same place."""
    hidden: tuple[str, ...]
    """Folders inside the binds that are covered by an empty one."""
    landlock_abi: int
    """0 where Landlock is missing."""
    filter_hex: str
    """The system call filter; empty where seccomp is missing."""
    tmp_bytes: int
    """Size of /tmp; 0 for none that can be written."""
    tmp_inodes: int
    """Files that /tmp can hold."""
    preload: tuple[str, ...]
    """Modules imported before any child is forked."""
    packages: str = ""
    """Folder of third-party packages, inside the binds; empty for none."""
    executables: tuple[str, ...] = ()
    """Files inside the binds that candidates may start as programs."""

    def to_json(self) -> str:
        """The spec as one argument of a command line."""
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> JailSpec:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("binds", "hidden", "preload", "executables"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
