"""The interpreter's code in huge pages, one copy for all processes of the service.

A child that runs mapped code takes a fault for every sixteen pages of it, and gives up a mapping for each page when it
ends. The service therefore keeps the code once in a memory file of huge pages (`code_file`), and supervisors and
zygotes map that in the place of their library's own pages; what they fork inherits it. A fault then brings 2 MiB, and
candidate, judge, zygote and supervisor, which take turns on one core, find each other's code in its cache. Where the
kernel has no huge page to give, all stay with the library's pages.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from services.sandbox.kernel import libc
from services.sandbox.kernel.numbers import numbers

HUGE_BYTES: Final = 2 << 20
_READ, _EXECUTE = 1, 4
_SHARED, _PRIVATE, _HERE, _ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MAY_MOVE, _FIXED = 1, 2
_WANT_HUGE, _COLLAPSE = 14, 25
"""Of mmap, mremap and madvise. Not from the module `mmap`: its library would be mapped in every child."""


class Span(NamedTuple):
    """Mapped memory from `start` to `end`, in bytes."""

    start: int
    end: int


def code_span() -> Span:
    """The whole huge pages in the stretch of read-only mappings of one file that holds the interpreter's code; may be
    empty. Libraries of packages are left alone: they are large, and little of them runs."""
    code = ctypes.cast(ctypes.pythonapi.PyEval_EvalCode, ctypes.c_void_p).value or 0
    stretch, file = Span(0, 0), ""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            place, rights, _, _, inode, *_ = line.split()
            start, end = (int(part, 16) for part in place.split("-"))
            goes_on = start == stretch.end and inode == file and rights.startswith("r-")
            if stretch.start <= code < stretch.end and not goes_on:
                break
            stretch = Span(stretch.start if goes_on else start, end)
            file = inode if rights.startswith("r-") else ""
    return Span(-(-stretch.start // HUGE_BYTES) * HUGE_BYTES, stretch.end // HUGE_BYTES * HUGE_BYTES)


def use_code(descriptor: int) -> None:
    """Puts the code in the memory file behind `descriptor` into the place of this process's own, in one step.

    OSError, and nothing is changed, where the kernel refuses or the file holds other code, as after an upgrade.
    """
    span, call = code_span(), numbers()
    size = span.end - span.start
    room = libc.syscall(call["mmap"], None, size + HUGE_BYTES, 0, _PRIVATE | _ANONYMOUS, -1, 0)
    place = -(-room // HUGE_BYTES) * HUGE_BYTES
    try:
        libc.syscall(call["mmap"], place, size, _READ | _EXECUTE, _SHARED | _HERE, descriptor, 0)
        libc.syscall(call["madvise"], place, size, _WANT_HUGE)
        libc.syscall(call["madvise"], place, size, _COLLAPSE)
        if not libc.is_equal(place, span.start, size):
            raise OSError("the memory file holds other code than this interpreter's")
        libc.syscall(call["mremap"], place, size, size, _MAY_MOVE | _FIXED, span.start)
    finally:
        libc.syscall(call["munmap"], room, size + HUGE_BYTES)
