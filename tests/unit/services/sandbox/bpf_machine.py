"""Interprets classic BPF programs of the kind seccomp takes, as the kernel would."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def run_filter(program: bytes, *, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """The action for one system call; arguments are 64-bit."""
    padded = (*arguments, *(0 for _ in range(6 - len(arguments))))
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(value & (1 << 64) - 1 for value in padded))
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = instructions[position]
        position += 1
        if code == _RETURN:
            return int(value)
        if code == _LOAD_WORD:
            accumulator = int.from_bytes(data[value : value + 4], "little")
            continue
        holds = {
            _JUMP_EQUAL: accumulator == value,
            _JUMP_AT_LEAST: accumulator >= value,
            _JUMP_ANY_BIT: bool(accumulator & value),
        }[code]
        position += if_true if holds else if_false
