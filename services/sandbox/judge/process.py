"""The judge process: takes a job and the channel to one candidate, answers with the outcome.

It is kept while its outcomes are `passed`; any other ends it. It never sees an exit status, output or file of the
candidate. Does not protect one job's tests from another's in the same process: the supervisor keeps a judge only within
one caller's stream.
"""

from __future__ import annotations

import _socket
import marshal
import os
import struct
import sys
from typing import Any, Final, NoReturn

from services.sandbox.jail.seal import set_job_limits
from services.sandbox.jail.spec import CONTROL
from services.sandbox.judge.inside import run_inside
from services.sandbox.judge.outcome import Failed, Refused
from services.sandbox.judge.program import run_program
from services.sandbox.judge.remote import Remote
from services.sandbox.wire.frames import Channel, ChannelClosed

FRAME_MAX_BYTES: Final = 4 * 1024 * 1024
TOTAL_MAX_BYTES: Final = 64 * 1024 * 1024
JOB_MAX_BYTES: Final = 64 * 1024 * 1024
RECURSION_LIMIT: Final = 3000


def serve() -> NoReturn:
    """Judges one candidate after the other until one does not pass; ChannelClosed when the supervisor leaves."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    control = _socket.socket(fileno=CONTROL)
    supervisor = Channel(CONTROL, frame_max_bytes=JOB_MAX_BYTES, total_max_bytes=1 << 62)
    while True:
        descriptor = _receive_descriptor(control)
        job = marshal.loads(supervisor.receive_bytes())
        if job["limits"]:
            set_job_limits(**job["limits"])
        _judge(job, descriptor, supervisor)
        os.close(descriptor)


def _receive_descriptor(control: _socket.socket) -> int:
    message, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(4))
    if not message or not ancillary:
        raise ChannelClosed("the supervisor left")
    return int(struct.unpack("i", ancillary[0][2])[0])


def _judge(job: dict[str, Any], descriptor: int, supervisor: Channel) -> None:
    """Returns only after `passed`."""

    def end(verdict: str, detail: str) -> NoReturn:
        supervisor.send({"verdict": verdict, "detail": detail, "calls": remote.calls})
        os._exit(0)

    channel = Channel(descriptor, frame_max_bytes=FRAME_MAX_BYTES, total_max_bytes=TOTAL_MAX_BYTES)
    remote = Remote(channel, end)
    try:
        (run_inside if job["is_inside"] else run_program)(job, remote)
    except Failed as failure:
        end(failure.verdict, failure.detail)
    except Refused as refusal:
        end("refused", str(refusal))
    supervisor.send({"verdict": "passed", "detail": "", "calls": remote.calls})
