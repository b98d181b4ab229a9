"""A channel in which frames wait already: what a rehearsal reads instead of a peer's words."""

from __future__ import annotations

import _socket
from collections.abc import Iterable

from services.sandbox.wire.frames import Channel


def with_frames(frames: Iterable[bytes]) -> tuple[_socket.socket, _socket.socket]:
    """Our end, and theirs with `frames` in it and nothing after them; they must fit into the socket's buffer."""
    ours, theirs = _socket.socketpair()
    channel = Channel(ours.fileno(), frame_max_bytes=0, total_max_bytes=0)
    for frame in frames:
        channel.send_bytes(frame)
    ours.shutdown(_socket.SHUT_WR)
    return ours, theirs
