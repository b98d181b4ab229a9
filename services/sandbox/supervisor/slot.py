"""One slot: runs one job at a time between a candidate and a judge, and makes the record of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import marshal
import os
import signal
import socket
from typing import Final

from services.sandbox.guest.runner import MARK_EMPTY, MARK_MEMORY, MARK_SYNTAX
from services.sandbox.job import Job
from services.sandbox.kernel.cgroups import Group
from services.sandbox.policy import ADDRESS_SPACE_EXTRA_BYTES, FILE_BYTES, HEAD_MAX_BYTES, Limits
from services.sandbox.supervisor.candidates import UIDS_PER_ZYGOTE, Candidates, Prepared, set_oom_score
from services.sandbox.supervisor.compare import outputs_match
from services.sandbox.supervisor.judges import JudgeProcess, Judges, channel_over
from services.sandbox.supervisor.meter import GroupMeter, Meter, TreeMeter
from services.sandbox.supervisor.output import Output
from services.sandbox.supervisor.run import Run
from services.sandbox.supervisor.spec import SlotSpec
from services.sandbox.supervisor.zygote import Ending
from services.sandbox.verdict import Evidence, Record, Verdict, decide
from services.sandbox.wire.frames import ChannelClosed

_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
SELF_TEST: Final = Job(
    code=b"def double(n):\n    return n * 2\n",
    tests="assert double(21) == 42",
    exports=("double",),
    limits=Limits(cpu_s=5.0, wall_s=10.0),
)


class Slot:
    """Runs jobs one after the other. ZygoteLost out of `run` means that the slot must be built again."""

    def __init__(self, spec: SlotSpec) -> None:
        """Builds both jails; JailRefused, ZygoteLost."""
        self._spec = spec
        self._group = Group(spec.hierarchy, spec.group_name) if spec.hierarchy else None
        self._meter: Meter = GroupMeter(self._group) if self._group else TreeMeter()
        first_uids = {name: spec.uid_base + UIDS_PER_ZYGOTE * (1 + i) for i, name in enumerate(spec.candidates)}
        self._judges = Judges(spec.judge, uid_base=spec.uid_base, code=spec.code)
        self._candidates = Candidates(
            spec.candidates,
            first_uids=first_uids,
            on_spawn=self._adopt,
            is_expendable=self._group is not None,
            code=spec.code,
        )

    def run(self, job: Job, cancel: int) -> Record:
        """The record of one job; `cancel` becomes readable when nobody wants it any more.

        A judge that dies is our fault; one that dies twice on the same candidate, and passes the self-test between, was
        killed by what the candidate sent. A pass in the candidate's own process counts only if it comes twice.
        """
        record, has_lost_judge = self._run_once(job, cancel)
        if job.is_inside and record.verdict is Verdict.PASSED:
            return self._run_once(job, cancel)[0].after(record)
        if not has_lost_judge or not self._is_sound(cancel):
            return record
        again, has_lost_judge = self._run_once(job, cancel)
        if has_lost_judge and self._is_sound(cancel):
            again = dataclasses.replace(again, verdict=Verdict.FORBIDDEN, detail="ended the judge twice")
        return again.after(record)

    def prepare_next(self) -> None:
        """Forks the next candidate and judge while nobody waits."""
        self._candidates.prepare_next()
        self._judges.prepare_next()

    def usage_bytes(self) -> int:
        """Memory of the slot's control group now; 0 without one."""
        return self._group.usage_bytes() if self._group else 0

    def close(self) -> None:
        """Ends everything in the slot and removes its group."""
        self._candidates.close()
        self._judges.close()
        if self._group:
            self._group.close()

    def _run_once(self, job: Job, cancel: int) -> tuple[Record, bool]:
        candidate = self._candidates.take(job.profile, job.limits.tmp_bytes)
        judge = None if job.is_program else self._judges.take(job.judge_key)
        output = Output((candidate.stdout, candidate.stderr), job.limits.output_bytes)
        self._meter.start(candidate.child.pid, candidate.zygote.pid, job.limits.memory_bytes, job.limits.pids)
        run = Run(job, candidate.child, judge, output, self._meter, cancel)
        try:
            self._start(job, candidate, judge)
            run.watch()
        finally:
            wall_s = run.wall_s
            candidate.child.kill()
        run.cpu_s = max(run.cpu_s, self._meter.cpu_s() if self._meter.is_exact else 0.0)
        judge_s, ending = run.judge_s(), self._ending(run, candidate)
        if run.stop:
            run.count_calls()
        output.drain()
        evidence = self._evidence(job, run, output, ending, candidate)
        candidate.channel.close()
        if judge:
            self._judges.finish(judge, has_passed=evidence.said == Verdict.PASSED)
        record = self._record(job, evidence, output)
        record.wall_s, record.judge_s = wall_s, judge_s
        record.waited_share = min(1.0, run.waited_s / wall_s) if wall_s else 0.0
        return record, run.judge_died and evidence.stop is None

    def _ending(self, run: Run, candidate: Prepared) -> Ending:
        """How a candidate ended. One that passed was killed by us, and its control group knows its CPU time."""
        if run.has_passed and self._meter.is_exact:
            self._candidates.leave(candidate)
            return Ending(status=signal.SIGKILL, cpu_s=0.0)
        return self._candidates.finish(candidate)

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
                "is_inside": job.is_inside,
                "names": job.names,
                "limits": guest_limits,
            }
            channel_over(candidate.channel).send_bytes(marshal.dumps(guest_job))
        if judge:
            judge.begin(job, candidate.channel)

    def _evidence(self, job: Job, run: Run, output: Output, ending: Ending, candidate: Prepared) -> Evidence:
        evidence = Evidence(
            limits=job.limits,
            said=run.answer.get("verdict", ""),
            detail=run.answer.get("detail", ""),
            calls=None if job.is_inside else run.calls,
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
            mode="stdio" if job.is_program else job.mode,
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
            profile_digest=self._spec.profile_digests[job.profile],
            refusal=evidence.detail if evidence.said == "refused" else "",
        )

    def _is_sound(self, cancel: int) -> bool:
        return self._run_once(SELF_TEST, cancel)[0].verdict is Verdict.PASSED

    def _adopt(self, pid: int) -> None:
        if self._group:
            self._group.add(pid)
            set_oom_score(pid, -1000)


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
