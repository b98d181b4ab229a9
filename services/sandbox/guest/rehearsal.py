"""What every candidate does, done on a dummy: it warms the zygote's code, and shows which memory a child writes to."""

from __future__ import annotations

import marshal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from services.sandbox.guest.calls import Guest
from services.sandbox.wire.frames import Channel, frame_of
from services.sandbox.wire.waiting import with_frames

_DUMMY: Final = b"from typing import List\ndef f(n: List[int]) -> int:\n    return [n, 'a', 1.5]\n"
_CALLS: Final = (
    [1, "call", 0, [["l", 0, 1, 2]], []],
    [2, "call", 0, ["a"], []],
    [3, "each", 0, [marshal.dumps(([[1, 2]], {})).hex()], []],
)
_LIMITS: Final = {"cpu_s": 60.0, "memory_bytes": 1 << 40, "pids": 512, "file_bytes": 1 << 20}


def rehearse() -> None:
    """Loads the dummy and calls it, in this process."""
    ours, theirs = with_frames(map(frame_of, _CALLS))
    channel = Channel(theirs.fileno(), frame_max_bytes=1 << 16, total_max_bytes=1 << 20)
    module, guest = types.ModuleType("rehearsal"), Guest(channel)
    guest.answer(0, lambda: exec(compile(_DUMMY, "rehearsal.py", "exec", dont_inherit=True), module.__dict__))
    guest.answer(0, lambda: module.__dict__["f"])
    for _ in _CALLS:
        guest.serve(channel.receive())
    ours.close()
    theirs.close()


@contextmanager
def rehearsal_channel() -> Iterator[int]:
    """A descriptor as a candidate's channel, with a dummy job and calls waiting in it."""
    job = {"code": _DUMMY, "is_program": False, "is_inside": False, "names": ["f"], "limits": _LIMITS}
    ours, theirs = with_frames([marshal.dumps(job), *map(frame_of, _CALLS)])
    try:
        yield theirs.fileno()
    finally:
        ours.close()
        theirs.close()
