"""The memory file that holds the interpreter's code once for all processes of the service (see `jail.huge_code`)."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
from typing import Final

from services.sandbox.jail.huge_code import code_span, use_code

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
NONE: Final = -1


@functools.cache
def shared_code() -> int:
    """Its descriptor, once this process runs that code too; NONE where the kernel has no huge pages for it."""
    span = code_span()
    if span.start >= span.end:
        return NONE
    descriptor = os.memfd_create("interpreter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _write_all(descriptor, ctypes.string_at(span.start, span.end - span.start))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        use_code(descriptor)
    except OSError:
        os.close(descriptor)
        return NONE
    return descriptor


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
