"""Landlock: a process gives up files, TCP and signals for good, without any privilege.

Does not hide names: `stat` of a path outside still answers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Final

from services.sandbox.kernel.libc import syscall
from services.sandbox.kernel.numbers import numbers

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
_FILE_BITS_BY_ABI: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_TCP: Final = 0b11
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 0b11
_VERSION_FLAG: Final = 1
_RULE_PATH_BENEATH: Final = 1

READ: Final = READ_FILE | READ_DIR
READ_WRITE_NODE: Final = READ_FILE | WRITE_FILE


def landlock_abi() -> int:
    """The kernel's Landlock version; OSError (ENOSYS, EOPNOTSUPP) where there is none."""
    return syscall(numbers()["landlock_create_ruleset"], None, 0, _VERSION_FLAG)


def all_file_access(abi: int) -> int:
    """Every right over files that this version can take away."""
    return (1 << _FILE_BITS_BY_ABI[min(abi, max(_FILE_BITS_BY_ABI))]) - 1


def build_ruleset(allowed: Mapping[str, int], abi: int) -> int:
    """Descriptor of a ruleset that leaves a process `allowed` (path to rights) and nothing else: no TCP from ABI 4 on,
    no signal or abstract socket outside the process's own domain from ABI 6 on."""
    handled = all_file_access(abi)
    network = _NETWORK_TCP if abi >= 4 else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = (ctypes.c_uint64 * 3)(handled, network, scoped)
    ruleset = syscall(numbers()["landlock_create_ruleset"], ctypes.byref(attributes), size, 0)
    for path, access in allowed.items():
        _allow(ruleset, path, access & handled)
    return ruleset


def restrict(ruleset: int) -> None:
    """Puts the process under `ruleset` for good. no_new_privs must be set."""
    syscall(numbers()["landlock_restrict_self"], ruleset, 0)


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = access.to_bytes(8, "little") + descriptor.to_bytes(4, "little")
        syscall(numbers()["landlock_add_rule"], ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)
