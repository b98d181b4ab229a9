"""The judges of a slot: one that is kept while it only says `passed`, and one forked ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import marshal
import os
import socket
from typing import Any, Final

from services.sandbox.jail.spec import JailSpec
from services.sandbox.job import Job
from services.sandbox.policy import JUDGE_MEMORY_BYTES
from services.sandbox.supervisor.zygote import Child, Zygote
from services.sandbox.wire.frames import Channel, with_header

RUNS_MAX: Final = 64
_ANSWER_MAX_BYTES: Final = 1 << 20


def channel_over(end: socket.socket) -> Channel:
    """Frames over a socket of ours, for small answers."""
    return Channel(end.fileno(), frame_max_bytes=_ANSWER_MAX_BYTES, total_max_bytes=1 << 62)


@dataclasses.dataclass
class JudgeProcess:
    """A judge and the channel to it."""

    child: Child
    end: socket.socket
    channel: Channel
    key: str = ""
    runs: int = 0

    def begin(self, job: Job, candidate: socket.socket) -> None:
        """Hands over the tests and the channel to the candidate; a judge that is gone is found by who watches it."""
        message = b"J" + with_header(marshal.dumps(_tests_of(job, is_first=self.runs == 0)))
        with contextlib.suppress(OSError):
            sent = socket.send_fds(self.end, [message], [candidate.fileno()])
            self.end.sendall(message[sent:])


class Judges:
    """Forks judges. A judge serves jobs of one key only, and none twice that has no key."""

    def __init__(self, spec: JailSpec, *, uid_base: int, code: int) -> None:
        """JailRefused, ZygoteLost."""
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._zygote = Zygote(spec, uid_base=uid_base, on_spawn=lambda pid: None, code=code)
        self._spare: JudgeProcess | None = None
        self._kept: JudgeProcess | None = None
        self.prepare_next()

    def take(self, key: str) -> JudgeProcess:
        """A judge for one job."""
        judge, self._kept = self._kept, None
        if judge and judge.key == key and judge.runs < RUNS_MAX:
            return judge
        if judge:
            self._end(judge)
        judge, self._spare = self._spare or self._fork(), None
        judge.key = key
        return judge

    def finish(self, judge: JudgeProcess, *, has_passed: bool) -> None:
        """Keeps the judge for the next job of its key, or ends it."""
        judge.runs += 1
        if has_passed and judge.key:
            self._kept = judge
        else:
            self._end(judge)

    def prepare_next(self) -> None:
        """Forks a judge while nobody waits."""
        if self._spare is None and self._kept is None:
            self._spare = self._fork()

    def close(self) -> None:
        """Ends all of them."""
        self._zygote.close()

    def _fork(self) -> JudgeProcess:
        ours, theirs = socket.socketpair()
        child = self._zygote.fork((self._null, self._null, self._null, theirs.fileno()))
        theirs.close()
        return JudgeProcess(child, ours, channel_over(ours))

    def _end(self, judge: JudgeProcess) -> None:
        judge.child.kill()
        self._zygote.leave(judge.child)
        judge.end.close()


def _tests_of(job: Job, *, is_first: bool) -> dict[str, Any]:
    limits = {"cpu_s": 3600.0, "memory_bytes": JUDGE_MEMORY_BYTES, "pids": job.limits.pids, "file_bytes": 0}
    return {
        "form": job.form,
        "is_inside": job.is_inside,
        "tests": job.tests,
        "preamble": job.preamble,
        "setup": job.setup,
        "entry_point": job.entry_point,
        "exports": list(job.exports),
        "seed": job.seed,
        "tolerance": job.tolerance,
        "limits": limits if is_first else None,
    }
