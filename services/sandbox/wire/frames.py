"""Frames over a stream: 4-byte length, then JSON. Bounded before anything is allocated or decoded."""

from __future__ import annotations

import json
import json.encoder
import os
from typing import Any, Final

HEADER_BYTES: Final = 4
_READ_AHEAD_BYTES: Final = 1 << 12
_READ_MAX_BYTES: Final = 1 << 20
_encode = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, lambda value: None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True
)
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
"""Both made once: `json.dumps` builds its encoder anew for every message, `json.loads` looks for white space twice."""


class ChannelClosed(Exception):
    """The other side is gone."""


class FrameTooLarge(Exception):
    """A frame, or all frames together, exceed their bound; nothing of it was sent or kept."""


class MalformedFrame(Exception):
    """Bytes that no honest peer sends."""


def frame_of(message: Any) -> bytes:
    """The body of the frame for `message`."""
    return "".join(_encode(message, 0)).encode("ascii")


def message_of(body: bytes) -> Any:
    """The message behind a frame's body; MalformedFrame."""
    try:
        text = body.decode("ascii")
        message, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError) as error:
        raise MalformedFrame("frame is no JSON of this protocol") from error
    if end != len(text):
        raise MalformedFrame("frame has more than one value")
    return message


def with_header(body: bytes) -> bytes:
    """The frame of `body` as it is written."""
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class Channel:
    """One end of a stream of frames over `descriptor`, which stays the caller's.

    `frame_max_bytes` bounds each frame read, `total_max_bytes` all of them together.
    """

    def __init__(self, descriptor: int, *, frame_max_bytes: int, total_max_bytes: int) -> None:
        self.descriptor = descriptor
        self._frame_max_bytes = frame_max_bytes
        self._left_bytes = total_max_bytes
        self._buffer = b""

    def send(self, message: Any, *, max_bytes: int | None = None) -> None:
        """Writes one frame; FrameTooLarge beyond `max_bytes`, ChannelClosed if nobody reads."""
        body = frame_of(message)
        if max_bytes is not None and len(body) > max_bytes:
            raise FrameTooLarge(f"value of {len(body)} bytes; at most {max_bytes} cross")
        self.send_bytes(body)

    def send_bytes(self, body: bytes) -> None:
        """Writes one frame as it is; ChannelClosed if nobody reads."""
        rest = memoryview(with_header(body))
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Any:
        """The next frame, decoded; ChannelClosed at its end, FrameTooLarge, MalformedFrame."""
        return message_of(self.receive_bytes())

    def receive_bytes(self) -> bytes:
        """The body of the next frame; ChannelClosed at its end, FrameTooLarge."""
        size = int.from_bytes(self._take(HEADER_BYTES), "big")
        self._left_bytes -= size
        if size > self._frame_max_bytes or self._left_bytes < 0:
            raise FrameTooLarge(f"frame of {size} bytes; at most {self._frame_max_bytes} cross")
        return self._take(size)

    def _take(self, size: int) -> bytes:
        if len(self._buffer) < size:
            parts, missing = [self._buffer], size - len(self._buffer)
            while missing > 0:
                part = self._read(max(missing, _READ_AHEAD_BYTES))
                parts.append(part)
                missing -= len(part)
            self._buffer = b"".join(parts)
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _read(self, size: int) -> bytes:
        try:
            part = os.read(self.descriptor, min(size, _READ_MAX_BYTES))
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not part:
            raise ChannelClosed("the other side closed the channel")
        return part
