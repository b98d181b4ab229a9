"""The service's side of one slot: starts its supervisor, sends jobs, takes records, cancels.

Nothing of a candidate is decoded here: records are the supervisor's own frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any, Final

from services.sandbox import job as jobs
from services.sandbox.job import Job
from services.sandbox.policy import ANSWER_EXTRA_S
from services.sandbox.supervisor.process import FRAME_MAX_BYTES, NUMBER_BYTES
from services.sandbox.supervisor.spec import SlotSpec
from services.sandbox.supervisor.zygote import FLAGS
from services.sandbox.verdict import Record, from_wire
from services.sandbox.wire.frames import HEADER_BYTES, MalformedFrame, frame_of, message_of, with_header
from smeltkit.errors import BadCode, IsolationTooWeak

_BOOT: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop()); from services.sandbox.supervisor.process import main; main()"
)
_ROOT: Final = str(Path(__file__).resolve().parents[2])
_INTERPRETER: Final = os.path.realpath(sys.executable)
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 5.0
_OVERHEAD_S: Final = 30.0
"""For what a supervisor does around a run: self-tests after a judge's death included."""


class SlotLost(Exception):
    """The slot's supervisor died or gave up; what ran in it has no verdict."""


class _Frames(asyncio.Protocol):
    """The supervisor's frames: one is asked for at a time."""

    def __init__(self) -> None:
        self.is_closed = False
        self._buffer = bytearray()
        self._next: asyncio.Future[int] | None = None

    async def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next frame; SlotLost at the end of the stream, for one that is too large or malformed, and after
        `timeout_s`. Whoever leaves before it came may ask again."""
        loop = asyncio.get_running_loop()
        self._next = loop.create_future()
        deadline = loop.call_later(timeout_s, self._fail, "it does not answer")
        try:
            self._look()
            end = HEADER_BYTES + await self._next
            body = bytes(self._buffer[HEADER_BYTES:end])
            del self._buffer[:end]
            frame: dict[str, Any] = message_of(body)
            return frame
        except MalformedFrame as error:
            raise SlotLost(f"the supervisor's {error}") from error
        finally:
            deadline.cancel()
            self._next = None

    def data_received(self, data: bytes) -> None:
        """Keeps what came."""
        self._buffer += data
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits hears of it."""
        self.is_closed = True
        self._look()

    def _look(self) -> None:
        """Tells who waits the size of the frame that is there; it stays in the buffer until taken."""
        size = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        if size > FRAME_MAX_BYTES:
            self._fail("its frame is too large")
        elif len(self._buffer) >= HEADER_BYTES + size and self._next and not self._next.done():
            self._next.set_result(size)
        elif self.is_closed:
            self._fail("it closed the channel")

    def _fail(self, reason: str) -> None:
        if self._next and not self._next.done():
            self._next.set_exception(SlotLost(f"the supervisor is gone: {reason}"))


class SlotClient:
    """One slot. Not for two jobs at once."""

    def __init__(self, spec: SlotSpec) -> None:
        self.spec = spec
        self.runs = 0
        self.is_sound = True
        """Whether it may run another job; a slot that is not must be started anew."""
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None
        self._frames = _Frames()
        self._transport: asyncio.Transport | None = None
        self._cancels: socket.socket | None = None

    @property
    def pid(self) -> int:
        """The supervisor's pid; 0 before start."""
        return self._process.pid if self._process else 0

    @property
    def is_alive(self) -> bool:
        """Whether the supervisor still runs, as far as is known without asking it."""
        return self.pid > 0 and self._transport is not None and not self._frames.is_closed

    async def start(self) -> None:
        """Builds the slot; IsolationTooWeak if the kernel refuses a step, SlotLost if the supervisor dies."""
        ours, theirs = socket.socketpair()
        cancels, cancels_end = socket.socketpair()
        for end in (ours, cancels):
            end.setblocking(False)
        descriptors = (theirs.fileno(), cancels_end.fileno())
        code = [self.spec.code] if self.spec.code >= 0 else []
        self._process = await asyncio.create_subprocess_exec(
            _INTERPRETER,
            *FLAGS,
            "-c",
            _BOOT,
            *map(str, descriptors),
            _ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            pass_fds=(*descriptors, *code),
            env={},
        )
        theirs.close()
        cancels_end.close()
        self._cancels = cancels
        self._transport, self._frames = await asyncio.get_running_loop().create_unix_connection(_Frames, sock=ours)
        self.runs, self.is_sound = 0, True
        self._send(frame_of(self.spec.to_wire()))
        answer = await self._frames.receive(START_TIMEOUT_S)
        if "lost" in answer:
            raise SlotLost(answer["lost"])
        if "refused" in answer:
            await self.stop()
            raise IsolationTooWeak(
                f"a slot at level {self.spec.level} cannot be built: {answer['refused']}; ask for a weaker level by "
                "SMELT_SANDBOX_LEVEL, or see the remedies that describe the missing layer",
                details={"required": self.spec.level, "errno": str(answer["errno"])},
            )

    async def run(self, job: Job) -> Record:
        """The record of `job`. A cancelled caller leaves only once the tree is dead and the slot free. SlotLost,
        BadCode if the judge finds the tests themselves unusable."""
        self._number += 1
        self.runs += 1
        self._send(self._number.to_bytes(NUMBER_BYTES, "big") + jobs.to_wire(job))
        try:
            answer = await self._frames.receive(2 * job.limits.wall_s + ANSWER_EXTRA_S + _OVERHEAD_S)
        except asyncio.CancelledError:
            self.is_sound = False
            self._cancel()
            with contextlib.suppress(SlotLost):
                await self._frames.receive(STOP_TIMEOUT_S)
                self.is_sound = True
            raise
        if "record" not in answer:
            raise SlotLost(str(answer.get("lost", "no record")))
        record = from_wire(answer["record"], job.limits)
        if record.refusal:
            raise BadCode(f"the tests cannot be used: {record.refusal}")
        return record

    async def stop(self) -> None:
        """Ends the supervisor and with it everything in the slot."""
        if self._transport:
            self._transport.close()
        if self._cancels:
            self._cancels.close()
        if self._process and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _cancel(self) -> None:
        if self._cancels:
            with contextlib.suppress(OSError):
                self._cancels.send(self._number.to_bytes(NUMBER_BYTES, "big"))

    def _send(self, body: bytes) -> None:
        if self._transport is None or self._frames.is_closed:
            raise SlotLost("the supervisor is gone")
        self._transport.write(with_header(body))
