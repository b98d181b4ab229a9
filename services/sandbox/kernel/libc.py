"""System calls that Python does not offer, through the C library; every failure is an OSError with its errno."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Any, Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 32
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2

_CAPABILITY_HEADER: Final = struct.pack("=2I", 0x20080522, 0)
"""Version 3, the calling thread."""
_NO_CAPABILITIES: Final = bytes(24)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_holding_gil = ctypes.PyDLL(None)


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: Any) -> int:
    """The raw system call `number`; arguments are ints (passed as 64 bits), bytes, None or ctypes values."""
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), f"syscall {number}")


def is_equal(first: int, second: int, size: int) -> bool:
    """Whether `size` bytes at the two addresses are the same."""
    return int(_libc.memcmp(*map(ctypes.c_void_p, (first, second)), ctypes.c_size_t(size))) == 0


def unshare(flags: int) -> None:
    """Moves the process (for pid: its later children) into new namespaces."""
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Joins the namespace behind `descriptor`."""
    _check(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mounts `source` on `target`."""
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {target}")


def umount(target: str) -> None:
    """Detaches the mount at `target` with all below it; open files keep it alive, names are gone at once."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def prctl(option: int, value: int = 0) -> None:
    """`prctl(option, value, 0, 0, 0)`."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def install_filter(program: bytes) -> None:
    """Installs a classic BPF program of 8-byte instructions; no_new_privs must be set, and there is no way back."""

    class SockFprog(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    described = SockFprog(len(program) // 8, program)
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    _check(_libc.prctl(PR_SET_SECCOMP, mode, ctypes.byref(described), zero, zero), "seccomp")


def capset(capabilities: int) -> None:
    """Sets the effective and permitted capabilities to this bit mask, the inheritable ones to none."""
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    _check(_libc.capset(_CAPABILITY_HEADER, struct.pack("=6I", low, low, 0, high, high, 0)), "capset")


def drop_capabilities() -> None:
    """`capset(0)` without building anything: it runs in every forked child, where each touched page costs."""
    _check(_libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES), "capset")


def fork() -> int:
    """A bare fork: no after-fork hook runs in the child, which touches far fewer pages than `os.fork`.

    Only for a process with one thread.
    """
    pid = int(_holding_gil.fork())
    if pid < 0:
        raise OSError(11, "fork: refused")
    return pid
