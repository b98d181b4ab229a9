"""The interpreter's code in huge pages, which all children share without one fault.

A child that runs mapped code takes a fault for every sixteen pages of it, and gives up a mapping for each page when it
ends. Code that was copied once into huge pages costs a fork one entry for 2 MiB. The copy is read-only and takes the
place of the original at once; where the kernel has no huge page to give, the original stays.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

from services.sandbox.kernel import libc
from services.sandbox.kernel.numbers import numbers

HUGE_BYTES: Final = 2 << 20
_READ, _WRITE, _EXECUTE = 1, 2, 4
_PRIVATE, _ANONYMOUS = 0x02, 0x20
_MAY_MOVE, _FIXED = 1, 2
_WANT_HUGE, _COLLAPSE = 14, 25
"""Of mprotect, mmap, mremap and madvise. Not from the module `mmap`: its library would be mapped in every child."""


class Span(NamedTuple):
    """Mapped memory from `start` to `end`, in bytes."""

    start: int
    end: int


def move_code() -> None:
    """Replaces what of the interpreter's library fills whole huge pages; for a process with one thread. OSError where
    the kernel refuses: then nothing is changed."""
    span = code_span()
    if span.start < span.end:
        _replace(span)


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


def _replace(span: Span) -> None:
    """Copies `span` into huge pages and puts them into its place in one step."""
    size, call = span.end - span.start, numbers()
    place = libc.syscall(call["mmap"], None, size + HUGE_BYTES, _READ | _WRITE, _PRIVATE | _ANONYMOUS, -1, 0)
    copy = -(-place // HUGE_BYTES) * HUGE_BYTES
    try:
        libc.syscall(call["madvise"], copy, size, _WANT_HUGE)
        ctypes.memmove(copy, span.start, size)
        libc.syscall(call["madvise"], copy, size, _COLLAPSE)
        libc.syscall(call["mprotect"], copy, size, _READ | _EXECUTE)
        libc.syscall(call["mremap"], copy, size, size, _MAY_MOVE | _FIXED, span.start)
    finally:
        libc.syscall(call["munmap"], place, size + HUGE_BYTES)
