"""Watches one run to its end: output, clocks, memory, the judge's word, and a caller who gives up.

The bounds that count are kept here, outside the jail; rlimits inside are backstops.
"""

from __future__ import annotations

import contextlib
import select
import time
from typing import Any, Final, Protocol

from services.sandbox.job import Job
from services.sandbox.policy import JUDGE_EXTRA_CPU_S
from services.sandbox.supervisor.meter import Meter, process_cpu_s, waited_s
from services.sandbox.supervisor.output import Output
from services.sandbox.supervisor.zygote import Child
from services.sandbox.verdict import Stop, Verdict
from services.sandbox.wire.frames import Channel, ChannelClosed, FrameTooLarge, MalformedFrame

WATCH_PERIOD_S: Final = 0.05
COUNT_WAIT_S: Final = 0.5
"""For the count of calls after a bound was reached: part of what an answer may come later than the bound."""
_READABLE: Final = select.POLLIN | select.POLLHUP | select.POLLERR


class Judge(Protocol):
    """What a run needs of a judge process."""

    child: Child
    channel: Channel


class Run:
    """One candidate at work. `watch` returns when it is decided or stopped; nothing is killed here."""

    def __init__(
        self, job: Job, candidate: Child, judge: Judge | None, output: Output, meter: Meter, cancel: int
    ) -> None:
        self._job = job
        self._candidate = candidate
        self._judge = judge
        self._output = output
        self._meter = meter
        self._cancel = cancel
        self._started_s = time.monotonic()
        self._judge_start_s = process_cpu_s(judge.child.pid) if judge else 0.0
        self.stop: Stop | None = None
        self.answer: dict[str, Any] = {}
        self.judge_died = False
        self.calls: int | None = None
        self.cpu_s = 0.0
        self.waited_s = 0.0
        self._is_over = False

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started_s

    @property
    def has_passed(self) -> bool:
        """Whether the judge said so, and no bound was reached before."""
        return self.stop is None and self.answer.get("verdict") == Verdict.PASSED

    def watch(self) -> None:
        """Blocks until the judge spoke, the program ended, or a bound is reached."""
        poller = select.poll()
        for descriptor in (*self._output.descriptors, self._candidate.pidfd, self._cancel):
            poller.register(descriptor, _READABLE)
        if self._judge:
            poller.register(self._judge.child.pidfd, _READABLE)
            poller.register(self._judge.channel.descriptor, _READABLE)
        next_check_s = self._next_check_s()
        while not self._is_over:
            limit_s = min(next_check_s, self._job.limits.wall_s)
            for descriptor, _ in poller.poll(max(0.0, limit_s - self.wall_s) * 1000 + 1):
                if not self._handle(descriptor):
                    poller.unregister(descriptor)
            if not self._is_over and self.wall_s >= next_check_s:
                self._check()
                next_check_s = self._next_check_s()
            if not self._is_over and self.wall_s >= self._job.limits.wall_s:
                self._end(Stop.WALL)
        if self.wall_s > WATCH_PERIOD_S:
            self.waited_s = waited_s(self._candidate.pid)

    def count_calls(self) -> None:
        """Takes the count of calls from a judge that was cut short, once the candidate is dead: one that waited for it
        answers now. Of one that works itself the count stays unknown; what else it says comes too late."""
        if self._judge is None or self.stop in (Stop.CANCELLED, Stop.JUDGE_CPU):
            return
        poller = select.poll()
        poller.register(self._judge.channel.descriptor, _READABLE)
        if poller.poll(COUNT_WAIT_S * 1000):
            with contextlib.suppress(ChannelClosed, FrameTooLarge, MalformedFrame):
                self.calls = self._judge.channel.receive().get("calls")

    def judge_s(self) -> float:
        """CPU seconds of the judge in this run, while it lives."""
        return process_cpu_s(self._judge.child.pid) - self._judge_start_s if self._judge else 0.0

    def _handle(self, descriptor: int) -> bool:
        """Whether to go on listening to `descriptor`."""
        if descriptor in self._output.descriptors:
            is_open = self._output.read(descriptor)
            if self._output.is_over:
                self._end(Stop.OUTPUT)
            return is_open
        if descriptor == self._cancel:
            self._end(Stop.CANCELLED)
        elif self._judge and descriptor == self._judge.channel.descriptor:
            self._hear_judge(self._judge)
        elif descriptor == self._candidate.pidfd:
            self._is_over = self._is_over or self._judge is None
        elif self._judge:
            self._hear_judge(self._judge)
        return False

    def _hear_judge(self, judge: Judge) -> None:
        if self._is_over:
            return
        self._is_over = True
        try:
            self.answer = judge.channel.receive()
            self.calls = self.answer.get("calls")
        except (ChannelClosed, FrameTooLarge, MalformedFrame):
            self.judge_died = True

    def _check(self) -> None:
        self.cpu_s = self._meter.cpu_s()
        if self.cpu_s >= self._job.limits.cpu_s:
            self._end(Stop.CPU)
        elif self._meter.sample_bytes() > self._job.limits.memory_bytes:
            self._end(Stop.MEMORY)
        elif self.judge_s() > self._job.limits.cpu_s + JUDGE_EXTRA_CPU_S:
            self._end(Stop.JUDGE_CPU)

    def _next_check_s(self) -> float:
        """When a bound could be passed at the earliest: a slot has one core, so CPU cannot outrun the wall clock."""
        if not self._meter.is_exact:
            return self.wall_s + WATCH_PERIOD_S
        limit_s = self._job.limits.cpu_s
        left_s = min(limit_s - self.cpu_s, limit_s + JUDGE_EXTRA_CPU_S - self.judge_s())
        return self.wall_s + max(left_s, WATCH_PERIOD_S)

    def _end(self, stop: Stop) -> None:
        self.stop, self._is_over = self.stop or stop, True
