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
    try:
        return _file_of(ctypes.string_at(span.start, span.end - span.start)) if span.start < span.end else NONE
    except OSError:
        return NONE


def _file_of(code: bytes) -> int:
    """The descriptor of a sealed file of `code`, which this process runs from now on."""
    descriptor = os.memfd_create("interpreter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        use_code(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
