"""What every judge does, done on a dummy: it warms the zygote's code, and shows which memory a child writes to."""

from __future__ import annotations

import _socket
import marshal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from services.sandbox.judge.program import run_program
from services.sandbox.judge.remote import Remote
from services.sandbox.wire.frames import Channel, frame_of
from services.sandbox.wire.waiting import with_frames

_LIMITS: Final = {"cpu_s": 60.0, "memory_bytes": 1 << 40, "pids": 512, "file_bytes": 0}
_JOB: Final[dict[str, Any]] = {
    "form": "check",
    "is_inside": False,
    "tests": "def check(candidate):\n    assert candidate([1, 2]) == [3, 'a']\n    assert candidate('a') == 1.5\n",
    "preamble": "import math\n",
    "setup": "",
    "entry_point": "f",
    "exports": [],
    "seed": "",
    "tolerance": 0.0,
    "limits": _LIMITS,
}
_REPLIES: Final = (
    [0, "ok", ["l", 0, ["l", 1], ["l", 2, ["h", 0, "c", "function"]]], []],
    [1, "ok", ["l", 1, 3, "a"], []],
    [2, "ok", 1.5, []],
)


def rehearse() -> None:
    """Runs the dummy's tests, in this process."""
    ours, theirs = with_frames(map(frame_of, _REPLIES))
    run_program(_JOB, Remote(Channel(theirs.fileno(), frame_max_bytes=1 << 16, total_max_bytes=1 << 20), _end))
    ours.close()
    theirs.close()


@contextmanager
def rehearsal_channel() -> Iterator[int]:
    """A descriptor as a judge's channel, with a dummy job and the channel to its candidate waiting in it."""
    candidate, theirs = with_frames(map(frame_of, _REPLIES))
    supervisor, control = _socket.socketpair()
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))]
    supervisor.sendmsg([b"J"], rights)
    Channel(supervisor.fileno(), frame_max_bytes=0, total_max_bytes=0).send_bytes(marshal.dumps(_JOB))
    supervisor.shutdown(_socket.SHUT_WR)
    try:
        yield control.fileno()
    finally:
        for end in (candidate, theirs, supervisor, control):
            end.close()


def _end(verdict: str, detail: str) -> NoReturn:
    raise AssertionError(f"the rehearsal ends with {verdict}: {detail}")
