"""The candidates of a slot: one zygote a profile, and one candidate forked ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

from services.sandbox.jail.spec import JailSpec
from services.sandbox.policy import TMP_INODES
from services.sandbox.supervisor.zygote import Child, Ending, JailRefused, Zygote, ZygoteLost

UIDS_PER_ZYGOTE: Final = 2


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A sealed candidate that waits for its job, and our ends of what it holds."""

    zygote: Zygote
    child: Child
    stdin: int
    stdout: int
    stderr: int
    channel: socket.socket

    def discard(self) -> None:
        """Ends a candidate that never got a job."""
        self.child.kill()
        self.zygote.reap(self.child)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.close(descriptor)
        self.channel.close()


class Candidates:
    """Forks candidates. The first profile's zygote starts at once, others when first asked for."""

    def __init__(
        self,
        specs: Mapping[str, JailSpec],
        *,
        first_uids: Mapping[str, int],
        on_spawn: Callable[[int], None],
        is_expendable: bool,
        code: int,
    ) -> None:
        """`first_uids` are the first of two host uids a profile; `is_expendable` lets the kernel end candidates first
        when the memory of their group runs out. JailRefused, ZygoteLost."""
        self._specs = specs
        self._first_uids = first_uids
        self._on_spawn = on_spawn
        self._is_expendable = is_expendable
        self._code = code
        self._zygotes: dict[str, Zygote] = {}
        self._tmp_bytes: dict[str, int] = {name: spec.tmp_bytes for name, spec in specs.items()}
        self._profile = next(iter(specs))
        self._spare: Prepared | None = self._prepare()

    def take(self, profile: str, tmp_bytes: int) -> Prepared:
        """A candidate of `profile` whose /tmp has this size."""
        if profile != self._profile or tmp_bytes != self._tmp_bytes[profile]:
            if self._spare:
                self._spare.discard()
            self._spare, self._profile, self._tmp_bytes[profile] = None, profile, tmp_bytes
        candidate, self._spare = self._spare or self._prepare(), None
        return candidate

    def prepare_next(self) -> None:
        """Forks the next candidate while nobody waits."""
        if self._spare is None:
            self._spare = self._prepare()

    def finish(self, candidate: Prepared) -> Ending:
        """Waits for a candidate that ended or was killed."""
        return candidate.zygote.reap(candidate.child)

    def leave(self, candidate: Prepared) -> None:
        """Leaves a candidate that was killed to the next fork, which waits for it: how it ended tells nothing."""
        candidate.zygote.leave(candidate.child)

    def close(self) -> None:
        """Ends all of them."""
        for zygote in self._zygotes.values():
            zygote.close()

    def _zygote(self) -> Zygote:
        name = self._profile
        if name not in self._zygotes:
            self._zygotes[name] = Zygote(
                self._specs[name], uid_base=self._first_uids[name], on_spawn=self._on_spawn, code=self._code
            )
        return self._zygotes[name]

    def _prepare(self) -> Prepared:
        """A new candidate, and an empty /tmp for it: those before it have ended now."""
        zygote = self._zygote()
        stdin = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        (out_read, out_write), (error_read, error_write) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        try:
            child = zygote.fork((stdin, out_write, error_write, theirs.fileno()))
        except JailRefused as error:
            raise ZygoteLost(str(error)) from error
        finally:
            theirs.close()
            os.close(out_write)
            os.close(error_write)
        zygote.sweep(self._tmp_bytes[self._profile], TMP_INODES)
        for descriptor in (out_read, error_read):
            os.set_blocking(descriptor, False)
        if self._is_expendable:
            set_oom_score(child.pid, 1000)
        return Prepared(zygote, child, stdin, out_read, error_read, ours)


def set_oom_score(pid: int, score: int) -> None:
    """How soon the kernel ends this process when its group is out of memory, -1000 (never) to 1000 (first)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%d" % score)
        finally:
            os.close(descriptor)
