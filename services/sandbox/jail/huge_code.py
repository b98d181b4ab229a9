"""The interpreter's code in huge pages, which all children share without one fault.

A child that runs mapped code takes a fault for every sixteen pages of it, and gives up a mapping for each page when it
ends. Code that was copied once into huge pages costs a fork one entry for 2 MiB. The copy is read-only and takes the
place of the original at once; where the kernel has no huge page to give, the original stays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
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
    """Replaces whatever of the mapped libraries fills whole huge pages; for a process with one thread. OSError where
    the kernel refuses: all that was replaced before stays so, and nothing else changes."""
    for span in list(code_spans()):
        _replace(span)


def code_spans() -> Iterator[Span]:
    """Whole huge pages in each library's stretch of read-only mappings, where some of it is code."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        rows = [line.split(maxsplit=5) for line in maps]
    start = end = 0
    file, is_code = "", False
    for row in [*rows, ["0-0", "", "", "", "", ""]]:
        first, last = (int(part, 16) for part in row[0].split("-"))
        name = row[5] if len(row) == 6 and row[1][:2] == "r-" and row[1].endswith("p") else ""
        if name == file and first == end:
            end, is_code = last, is_code or "x" in row[1]
            continue
        inner = Span(-(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES)
        if file.startswith("/") and is_code and inner.start < inner.end:
            yield inner
        start, end, file, is_code = first, last, name, "x" in row[1]


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
