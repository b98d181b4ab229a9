"""The supervisor process of a slot: takes numbered jobs from the service, answers with records.

Started by exec with two sockets: one for jobs, one for the numbers of cancelled jobs. It ends when the service goes
away, and with it everything in its slot.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from typing import Any, Final

from services.sandbox import job as jobs
from services.sandbox import verdict
from services.sandbox.jail.huge_code import use_code
from services.sandbox.kernel import libc
from services.sandbox.supervisor.slot import Slot
from services.sandbox.supervisor.spec import SlotSpec
from services.sandbox.supervisor.zygote import JailRefused, ZygoteLost
from services.sandbox.wire.frames import Channel, ChannelClosed

FRAME_MAX_BYTES: Final = 128 * 1024 * 1024
NUMBER_BYTES: Final = 8


def main() -> None:
    """Serves one slot described by the first frame, until the service closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    job_descriptor, cancel_descriptor = int(sys.argv[1]), int(sys.argv[2])
    service = Channel(job_descriptor, frame_max_bytes=FRAME_MAX_BYTES, total_max_bytes=1 << 62)
    try:
        _serve(service, socket.socket(fileno=cancel_descriptor))
    except ChannelClosed:
        return


def _serve(service: Channel, cancels: socket.socket) -> None:
    spec = SlotSpec.from_wire(service.receive())
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {spec.core})
    with contextlib.suppress(OSError):
        use_code(spec.code)
    try:
        slot = Slot(spec)
    except ZygoteLost as error:
        service.send({"lost": str(error)})
        return
    except (JailRefused, OSError) as error:
        service.send({"refused": str(error), "errno": getattr(error, "number", getattr(error, "errno", 0)) or 0})
        return
    service.send({"ready": True})
    gc.collect()
    gc.freeze()
    try:
        while True:
            service.send(_run(slot, service.receive_bytes(), cancels))
            slot.prepare_next()
    except ZygoteLost as error:
        service.send({"lost": str(error)})
    finally:
        slot.close()


def _run(slot: Slot, message: bytes, cancels: socket.socket) -> dict[str, Any]:
    """One job behind its number; a cancel of an earlier job that came too late is dropped first."""
    number, job = int.from_bytes(message[:NUMBER_BYTES], "big"), jobs.from_wire(message[NUMBER_BYTES:])
    if number in _cancelled_numbers(cancels):
        record = verdict.Record(verdict=verdict.Verdict.INFRA, detail="cancelled", limits=job.limits)
    else:
        record = slot.run(job, cancels.fileno())
    return {"record": verdict.to_wire(record)}


def _cancelled_numbers(cancels: socket.socket) -> set[int]:
    raw = b""
    with contextlib.suppress(BlockingIOError):
        while part := cancels.recv(4096, socket.MSG_DONTWAIT):
            raw += part
    return {int.from_bytes(raw[i : i + NUMBER_BYTES], "big") for i in range(0, len(raw), NUMBER_BYTES)}
