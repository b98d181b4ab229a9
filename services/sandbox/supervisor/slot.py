"""One slot: two zygotes, a spare candidate, a judge that is kept while it only says `passed`, one job at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import marshal
import os
import socket
from typing import Any, Final

from services.sandbox.guest.runner import MARK_EMPTY, MARK_MEMORY, MARK_SYNTAX
from services.sandbox.job import Job
from services.sandbox.kernel.cgroups import Group
from services.sandbox.policy import (
    ADDRESS_SPACE_EXTRA_BYTES,
    FILE_BYTES,
    HEAD_MAX_BYTES,
    JUDGE_MEMORY_BYTES,
    TMP_INODES,
    Limits,
)
from services.sandbox.supervisor.compare import outputs_match
from services.sandbox.supervisor.meter import GroupMeter, Meter, TreeMeter
from services.sandbox.supervisor.output import Output
from services.sandbox.supervisor.run import Run
from services.sandbox.supervisor.spec import SlotSpec
from services.sandbox.supervisor.zygote import Child, Ending, JailRefused, Zygote, ZygoteLost
from services.sandbox.verdict import Evidence, Record, Verdict, decide
from services.sandbox.wire.frames import Channel, ChannelClosed

JUDGE_RUNS_MAX: Final = 64
_ANSWER_MAX_BYTES: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
SELF_TEST: Final = Job(
    code=b"def double(n):\n    return n * 2\n",
    tests="assert double(21) == 42",
    exports=("double",),
    limits=Limits(cpu_s=5.0, wall_s=10.0),
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A sealed candidate that waits for its job, and our ends of what it holds."""

    child: Child
    stdin: int
    stdout: int
    stderr: int
    channel: socket.socket


@dataclasses.dataclass
class JudgeProcess:
    """A judge and the channel to it."""

    child: Child
    socket: socket.socket
    channel: Channel
    key: str
    runs: int = 0


class Slot:
    """Runs jobs one after the other. ZygoteLost out of `run` means that the slot must be built again."""

    def __init__(self, spec: SlotSpec) -> None:
        """Builds both jails; JailRefused, ZygoteLost."""
        self._spec = spec
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._group = Group(spec.hierarchy, spec.group_name) if spec.hierarchy else None
        self._tmp_bytes = spec.candidate.tmp_bytes
        self._candidates = Zygote(spec.candidate, uid_base=spec.uid_base, on_spawn=self._adopt)
        self._judges = Zygote(spec.judge, uid_base=spec.uid_base + 2, on_spawn=lambda pid: None)
        self._meter: Meter = GroupMeter(self._group) if self._group else TreeMeter(self._candidates.pid)
        self._spare: Prepared | None = self._prepare()
        self._judge: JudgeProcess | None = None

    def run(self, job: Job, cancel: int) -> Record:
        """The record of one job; `cancel` becomes readable when nobody wants it any more.

        A judge that dies is our fault; one that dies twice on the same candidate, and passes the self-test between, was
        killed by what the candidate sent.
        """
        record, has_lost_judge = self._run_once(job, cancel)
        if not has_lost_judge or not self._is_sound(cancel):
            return record
        again, has_lost_judge = self._run_once(job, cancel)
        if has_lost_judge and self._is_sound(cancel):
            again = dataclasses.replace(again, verdict=Verdict.FORBIDDEN, detail="ended the judge twice")
        return again.after(record)

    def prepare_next(self) -> None:
        """Forks the next candidate while nobody waits."""
        if self._spare is None:
            self._spare = self._prepare()

    def usage_bytes(self) -> int:
        """Memory of the slot's control group now; 0 without one."""
        return self._group.usage_bytes() if self._group else 0

    def close(self) -> None:
        """Ends everything in the slot and removes its group."""
        for zygote in (self._candidates, self._judges):
            zygote.close()
        if self._group:
            self._group.close()

    def _run_once(self, job: Job, cancel: int) -> tuple[Record, bool]:
        candidate = self._take_candidate(job.limits)
        judge = None if job.is_program else self._take_judge(job.judge_key)
        output = Output((candidate.stdout, candidate.stderr), job.limits.output_bytes)
        self._meter.start(candidate.child.pid, job.limits.memory_bytes, job.limits.pids)
        run = Run(job, candidate.child, judge, output, self._meter, cancel)
        try:
            self._start(job, candidate, judge)
            run.watch()
        finally:
            wall_s = run.wall_s
            candidate.child.kill()
        run.cpu_s = max(run.cpu_s, self._meter.cpu_s() if self._meter.is_exact else 0.0)
        judge_s, ending = run.judge_s(), self._candidates.reap(candidate.child)
        output.drain()
        evidence = self._evidence(job, run, output, ending, candidate)
        candidate.channel.close()
        if judge:
            self._keep_or_end(judge, evidence)
        record = self._record(job, evidence, output)
        record.wall_s, record.judge_s = wall_s, judge_s
        record.waited_share = min(1.0, run.waited_s / wall_s) if wall_s else 0.0
        self._candidates.sweep(self._tmp_bytes, TMP_INODES)
        return record, run.judge_died and evidence.stop is None

    def _start(self, job: Job, candidate: Prepared, judge: JudgeProcess | None) -> None:
        """Hands the code to the candidate and the tests to the judge; a side that is gone is found by the watch."""
        os.pwrite(candidate.stdin, job.stdin, 0)
        fcntl.fcntl(candidate.stdin, fcntl.F_ADD_SEALS, _SEALS)
        os.close(candidate.stdin)
        limits = job.limits
        memory_bytes = limits.memory_bytes + ADDRESS_SPACE_EXTRA_BYTES[self._group is not None]
        guest_limits = {
            "cpu_s": limits.cpu_s,
            "memory_bytes": memory_bytes,
            "pids": limits.pids,
            "file_bytes": FILE_BYTES,
        }
        with contextlib.suppress(ChannelClosed):
            guest_job = {
                "code": job.code,
                "is_program": job.is_program,
                "names": job.names,
                "limits": guest_limits,
            }
            _channel(candidate.channel).send_bytes(marshal.dumps(guest_job))
        if judge is None:
            return
        with contextlib.suppress(ChannelClosed, OSError):
            socket.send_fds(judge.socket, [b"J"], [candidate.channel.fileno()])
            judge.channel.send(_judge_job(job, is_first=judge.runs == 0))

    def _evidence(self, job: Job, run: Run, output: Output, ending: Ending, candidate: Prepared) -> Evidence:
        evidence = Evidence(
            limits=job.limits,
            said=run.answer.get("verdict", ""),
            detail=run.answer.get("detail", ""),
            calls=run.answer.get("calls", 0),
            stop=run.stop,
            status=ending.status,
            cpu_s=max(ending.cpu_s, run.cpu_s),
            output_bytes=output.total_bytes,
            was_oom_killed=self._meter.was_oom_killed(),
            judge_died=run.judge_died,
        )
        if job.is_program and run.stop is None:
            evidence.said, evidence.detail = _program_outcome(job, ending, _marks(candidate.channel), output)
        return evidence

    def _record(self, job: Job, evidence: Evidence, output: Output) -> Record:
        verdict, detail = decide(evidence)
        out, error = output.streams()
        head = job.limits.output_bytes if job.is_program else HEAD_MAX_BYTES
        is_killed = os.WIFSIGNALED(evidence.status)
        was_killed_by_us = not job.is_program and evidence.said != "lost"
        return Record(
            verdict=verdict,
            detail=detail,
            mode="stdio" if job.is_program else "split",
            level=self._spec.level,
            missing_layers=list(self._spec.missing_layers),
            calls=evidence.calls,
            cpu_s=evidence.cpu_s,
            peak_bytes=self._meter.peak_bytes(),
            stdout=out[:head],
            stderr=error[:head],
            output_bytes=output.total_bytes,
            exit_status=None if is_killed or was_killed_by_us else os.WEXITSTATUS(evidence.status),
            signal=os.WTERMSIG(evidence.status) if is_killed and not was_killed_by_us else 0,
            limits=job.limits,
            judge_digest=self._spec.judge_digest,
            profile_digest=self._spec.profile_digest,
            refusal=evidence.detail if evidence.said == "refused" else "",
        )

    def _is_sound(self, cancel: int) -> bool:
        return self._run_once(SELF_TEST, cancel)[0].verdict is Verdict.PASSED

    def _take_candidate(self, limits: Limits) -> Prepared:
        if limits.tmp_bytes != self._tmp_bytes:
            self._discard_spare()
            self._tmp_bytes = limits.tmp_bytes
            self._candidates.sweep(self._tmp_bytes, TMP_INODES)
        candidate, self._spare = self._spare or self._prepare(), None
        return candidate

    def _prepare(self) -> Prepared:
        stdin = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        (out_read, out_write), (error_read, error_write) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        try:
            child = self._candidates.fork((stdin, out_write, error_write, theirs.fileno()))
        except JailRefused as error:
            raise ZygoteLost(str(error)) from error
        finally:
            theirs.close()
            os.close(out_write)
            os.close(error_write)
        for descriptor in (out_read, error_read):
            os.set_blocking(descriptor, False)
        if self._group:
            _make_expendable(child.pid)
        return Prepared(child, stdin, out_read, error_read, ours)

    def _discard_spare(self) -> None:
        if self._spare:
            self._spare.child.kill()
            self._candidates.reap(self._spare.child)
            for descriptor in (self._spare.stdin, self._spare.stdout, self._spare.stderr):
                os.close(descriptor)
            self._spare.channel.close()
            self._spare = None

    def _take_judge(self, key: str) -> JudgeProcess:
        judge = self._judge
        if judge and (judge.key != key or not key or judge.runs >= JUDGE_RUNS_MAX):
            self._end_judge(judge)
            judge = None
        if judge is None:
            ours, theirs = socket.socketpair()
            child = self._judges.fork((self._null, self._null, self._null, theirs.fileno()))
            theirs.close()
            judge = self._judge = JudgeProcess(child, ours, _channel(ours), key)
        return judge

    def _keep_or_end(self, judge: JudgeProcess, evidence: Evidence) -> None:
        judge.runs += 1
        if evidence.said != Verdict.PASSED:
            self._end_judge(judge)

    def _end_judge(self, judge: JudgeProcess) -> None:
        judge.child.kill()
        self._judges.reap(judge.child)
        judge.socket.close()
        self._judge = None

    def _adopt(self, pid: int) -> None:
        if self._group:
            self._group.add(pid)
            _set_oom_score(pid, -1000)


def _judge_job(job: Job, *, is_first: bool) -> dict[str, Any]:
    limits = {"cpu_s": 3600.0, "memory_bytes": JUDGE_MEMORY_BYTES, "pids": job.limits.pids, "file_bytes": 0}
    return {
        "form": job.form,
        "tests": job.tests,
        "preamble": job.preamble,
        "setup": job.setup,
        "entry_point": job.entry_point,
        "exports": list(job.exports),
        "seed": job.seed,
        "tolerance": job.tolerance,
        "is_inside": job.is_inside,
        "limits": limits if is_first else None,
    }


def _program_outcome(job: Job, ending: Ending, marks: bytes, output: Output) -> tuple[str, str]:
    """What a program's end means: its first mark was written before foreign code ran, the rest only accuses itself."""
    error_head = output.streams()[1][-500:].decode("utf-8", "replace").strip().rpartition("\n")[2]
    if marks[:1] == MARK_EMPTY:
        return Verdict.NO_CODE, "the program is empty"
    if marks[:1] == MARK_SYNTAX:
        return Verdict.SYNTAX, error_head
    if MARK_MEMORY in marks:
        return Verdict.MEMORY, "MemoryError"
    if os.WIFSIGNALED(ending.status):
        return "lost", ""
    if os.WEXITSTATUS(ending.status):
        return Verdict.EXCEPTION, error_head or f"exit status {os.WEXITSTATUS(ending.status)}"
    if job.form == "stdio" and not outputs_match(output.streams()[0], job.expected_stdout, is_exact=job.is_exact):
        return Verdict.WRONG, "standard output differs from what is expected"
    return Verdict.PASSED, ""


def _marks(channel: socket.socket) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return channel.recv(64, socket.MSG_DONTWAIT)
    return b""


def _channel(end: socket.socket) -> Channel:
    return Channel(end.fileno(), frame_max_bytes=_ANSWER_MAX_BYTES, total_max_bytes=1 << 62)


def _make_expendable(pid: int) -> None:
    _set_oom_score(pid, 1000)


def _set_oom_score(pid: int, score: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%d" % score)
        finally:
            os.close(descriptor)
