"""Memory that every forked child writes to is copied by the fork itself, not by one page fault for each page.

Python writes to whatever it looks at (reference counts), so each child copies the same few hundred pages, and the
zygote copies its own again after each fork. The kernel copies a pinned page while it forks and leaves the original
writable. Pages are pinned as the buffers of an io_uring through which nothing is ever submitted: it has no thread, its
memory is not mapped, and its descriptor is closed in every child before any foreign byte. Where the kernel refuses,
forks share as usual.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from services.sandbox.kernel import libc
from services.sandbox.kernel.numbers import numbers

PAGES_MAX: Final = 2048
"""Pinned at most: 8 MiB, the usual bound of locked memory."""
_REGION_PAGES_MAX: Final = 1 << 18
"""Larger mappings are room that a library keeps, and not looked at."""
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
_ENTRY_BYTES: Final = 8
_PARAMETERS_BYTES: Final = 120
_REGISTER_BUFFERS: Final = 0
_HIGH: Final = 300
"""Above the descriptors that a child closes."""


class Region(NamedTuple):
    """A stretch of our own memory, in pages."""

    first: int
    pages: int


def find_hot_pages(work: Callable[[], None]) -> set[int]:
    """Numbers of the pages of this process that a forked child writes to while it does `work`, which may raise or close
    descriptors below 300; for a process with one thread. OSError where the kernel does not say."""
    regions = list(_writable_regions())
    before = _entries(regions, _open_pagemap())
    read_end, write_end = os.pipe()
    pid = libc.fork()
    if pid == 0:
        try:
            pagemap, report = os.dup2(_open_pagemap(), _HIGH), os.dup2(write_end, _HIGH + 1)
            try:
                work()
            finally:
                _write_all(report, _entries(regions, pagemap))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        after = pipe.read()
    os.waitpid(pid, 0)
    pages = (page for first, count in regions for page in range(first, first + count))
    entries = zip(pages, _unpacked(before), _unpacked(after), strict=False)
    return {page for page, ours, theirs in entries if _is_private(ours) and _is_private(theirs) and theirs & _EXCLUSIVE}


def pin(pages: set[int]) -> None:
    """Pins pages of this process for as long as it lives, at most PAGES_MAX; OSError if the kernel refuses."""
    ring = libc.syscall(numbers()["io_uring_setup"], 1, ctypes.create_string_buffer(_PARAMETERS_BYTES))
    chosen = sorted(pages)[:PAGES_MAX]
    buffers = b"".join(struct.pack("QQ", page * _PAGE_BYTES, _PAGE_BYTES) for page in chosen)
    libc.syscall(numbers()["io_uring_register"], ring, _REGISTER_BUFFERS, buffers, len(chosen))


def _writable_regions() -> Iterator[Region]:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            span, rights, *_ = line.split()
            if rights.startswith("rw") and rights.endswith("p"):
                start, end = (int(part, 16) // _PAGE_BYTES for part in span.split("-"))
                if end - start <= _REGION_PAGES_MAX:
                    yield Region(start, end - start)


def _open_pagemap() -> int:
    return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)


def _entries(regions: list[Region], pagemap: int) -> bytes:
    """The kernel's eight bytes about each page of `regions`; closes `pagemap`."""
    parts = [os.pread(pagemap, _ENTRY_BYTES * count, _ENTRY_BYTES * first) for first, count in regions]
    os.close(pagemap)
    return b"".join(parts)


def _unpacked(entries: bytes) -> Iterator[int]:
    return (entry for (entry,) in struct.iter_unpack("Q", entries))


def _is_private(entry: int) -> bool:
    return bool(entry & _PRESENT) and not entry & _FILE


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
