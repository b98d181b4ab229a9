"""The service's side of one slot: starts its supervisor, sends jobs, takes records, cancels.

Nothing of a candidate is decoded here: records are the supervisor's own frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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
from services.sandbox.wire.frames import HEADER_BYTES
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


class SlotClient:
    """One slot. Not for two jobs at once."""

    def __init__(self, spec: SlotSpec) -> None:
        self.spec = spec
        self.runs = 0
        self.is_sound = True
        """Whether it may run another job; a slot that is not must be started anew."""
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._cancels: socket.socket | None = None

    @property
    def pid(self) -> int:
        """The supervisor's pid; 0 before start."""
        return self._process.pid if self._process else 0

    @property
    def is_alive(self) -> bool:
        """Whether the supervisor still runs, as far as is known without asking it."""
        return self.pid > 0 and self._reader is not None and not self._reader.at_eof()

    async def start(self) -> None:
        """Builds the slot; IsolationTooWeak if the kernel refuses a step, SlotLost if the supervisor dies."""
        ours, theirs = socket.socketpair()
        cancels, cancels_end = socket.socketpair()
        for end in (ours, cancels):
            end.setblocking(False)
        descriptors = (theirs.fileno(), cancels_end.fileno())
        self._process = await asyncio.create_subprocess_exec(
            _INTERPRETER,
            *FLAGS,
            "-c",
            _BOOT,
            *map(str, descriptors),
            _ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            pass_fds=descriptors,
            env={},
        )
        theirs.close()
        cancels_end.close()
        self._cancels = cancels
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self.runs, self.is_sound = 0, True
        await self._send(self.spec.to_wire())
        answer = await self._receive(START_TIMEOUT_S)
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
        await self._send({"number": self._number, "job": jobs.to_wire(job)})
        reply = asyncio.ensure_future(self._receive(2 * job.limits.wall_s + ANSWER_EXTRA_S + _OVERHEAD_S))
        try:
            answer = await asyncio.shield(reply)
        except asyncio.CancelledError:
            self.is_sound = False
            self._cancel()
            with contextlib.suppress(SlotLost, TimeoutError):
                await asyncio.wait_for(reply, STOP_TIMEOUT_S)
                self.is_sound = True
            raise
        if "record" not in answer:
            raise SlotLost(str(answer.get("lost", "no record")))
        record = from_wire(answer["record"])
        if record.refusal:
            raise BadCode(f"the tests cannot be used: {record.refusal}")
        return record

    async def stop(self) -> None:
        """Ends the supervisor and with it everything in the slot."""
        if self._writer:
            self._writer.close()
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

    async def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode("ascii")
        if self._writer is None:
            raise SlotLost("not started")
        try:
            self._writer.write(len(body).to_bytes(HEADER_BYTES, "big") + body)
            await self._writer.drain()
        except ConnectionError as error:
            raise SlotLost(str(error)) from error

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        if self._reader is None:
            raise SlotLost("not started")
        try:
            async with asyncio.timeout(timeout_s):
                size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "big")
                if size > FRAME_MAX_BYTES:
                    raise SlotLost("frame too large")
                answer: dict[str, Any] = json.loads(await self._reader.readexactly(size))
                return answer
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
            raise SlotLost(f"the supervisor of slot {self.spec.index} is gone: {type(error).__name__}") from error
