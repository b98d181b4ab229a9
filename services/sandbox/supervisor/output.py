"""Counts what a candidate writes and keeps the heads; never decodes it."""

from __future__ import annotations

import contextlib
import os
from typing import Final

_READ_BYTES: Final = 1 << 16
STREAMS: Final = 2


class Output:
    """Standard output and error of one candidate, both bounded together by `limit_bytes`."""

    def __init__(self, descriptors: tuple[int, int], limit_bytes: int) -> None:
        self.descriptors = descriptors
        self.total_bytes = 0
        self._limit_bytes = limit_bytes
        self._kept: dict[int, list[bytes]] = {descriptor: [] for descriptor in descriptors}
        self._room_bytes = limit_bytes

    @property
    def is_over(self) -> bool:
        """Whether more was written than allowed."""
        return self.total_bytes > self._limit_bytes

    def read(self, descriptor: int) -> bool:
        """Takes what is there; False at the end of the stream."""
        try:
            part = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return True
        self.total_bytes += len(part)
        kept = part[: self._room_bytes]
        self._room_bytes -= len(kept)
        if kept:
            self._kept[descriptor].append(kept)
        return bool(part)

    def drain(self) -> None:
        """Takes what is left in the pipes of a dead tree, and closes them."""
        for descriptor in self.descriptors:
            while not self.is_over and self._has_more(descriptor):
                pass
            os.close(descriptor)

    def streams(self) -> tuple[bytes, bytes]:
        """What was kept of standard output and error."""
        out, error = (b"".join(self._kept[descriptor]) for descriptor in self.descriptors)
        return out, error

    def _has_more(self, descriptor: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            before = self.total_bytes
            return self.read(descriptor) and self.total_bytes > before
        return False
