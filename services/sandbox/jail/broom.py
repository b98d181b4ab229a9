"""The one process of a jail that may mount: replaces a dirty /tmp by a fresh one.

A hostile tree is never walked or deleted: the file system under it is dropped.
"""

from __future__ import annotations

import _socket

from services.sandbox.jail.rootfs import SCRATCH, free_space, is_pristine, mount_tmp
from services.sandbox.kernel import libc


def sweep_for_ever(control: _socket.socket, size_bytes: int, inodes: int) -> None:
    """Answers each message `SIZE INODES` once /tmp is empty and has these bounds; ends when the socket closes."""
    bounds, pristine = (size_bytes, inodes), free_space()
    while message := control.recv(64):
        size_text, inodes_text = message.split()
        wanted = (int(size_text), int(inodes_text))
        if wanted != bounds or not is_pristine(pristine):
            libc.umount(SCRATCH)
            mount_tmp(*wanted)
            bounds, pristine = wanted, free_space()
        control.send(b"clean")
