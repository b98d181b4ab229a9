"""The one process of a jail that may mount: replaces a dirty /tmp by a fresh one.

A hostile tree is never walked or deleted: the file system under it is dropped.
"""

from __future__ import annotations

import _socket
import os
import struct

from services.sandbox.jail.rootfs import SCRATCH, mount_tmp
from services.sandbox.kernel import libc


def sweep_for_ever(control: _socket.socket) -> None:
    """Answers each message `SIZE INODES` once /tmp is a fresh file system with these bounds, with a descriptor that
    tells how full it is; ends when the socket closes."""
    while message := control.recv(64):
        size_text, inodes_text = message.split()
        libc.umount(SCRATCH)
        mount_tmp(int(size_text), int(inodes_text))
        place = os.open(SCRATCH, os.O_PATH | os.O_CLOEXEC)
        control.sendmsg([b"clean"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", place))])
        os.close(place)
