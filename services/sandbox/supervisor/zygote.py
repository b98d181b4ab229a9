"""The supervisor's handle on one zygote: start, fork a child, kill and reap it, sweep its /tmp."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.sandbox.jail.spec import BROOM, CODE, CONTROL, INNER_UID, JailSpec

START_TIMEOUT_S: Final = 20.0
REPLY_TIMEOUT_S: Final = 10.0
_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[2]); from services.sandbox.jail.zygote import main; main()"
_ROOT: Final = str(Path(__file__).resolve().parents[3])
_HIGH: Final = 64
_ENVIRONMENT: Final = {  # symbols are bound at start, not once more in every fork
    "PYTHONHASHSEED": "0",
    "LD_BIND_NOW": "1",
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
}
_ONE_THREAD: Final = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": "/tmp",
}
"""For packages: a zygote must have one thread when it forks."""
_GET_PID_INFO: Final = 0xC040FF0B
_PID_INFO: Final = struct.Struct("16xI44x")
FLAGS: Final = ("-s", "-S", "-P", "-B", "-X", "utf8")
"""As -I -S, except that the hash seed is ours: the same set order in every run."""


class ZygoteLost(Exception):
    """The zygote died, or does not answer as it must."""


class JailRefused(Exception):
    """A step of building the jail was refused; the message names it, `number` is its errno."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Child:
    """A forked, sealed child: its pid in the jail, on the host, and the descriptor of its process."""

    inner_pid: int
    pid: int
    pidfd: int

    def kill(self) -> None:
        """Ends the child and all its descendants at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


@dataclass(frozen=True)
class Ending:
    """How a child ended: wait status, and CPU seconds of it and all that it reaped."""

    status: int
    cpu_s: float


@dataclass(frozen=True)
class _Tmp:
    """The file system behind /tmp: its size and inodes, a descriptor of it, and its traces when it was fresh."""

    bounds: tuple[int, int]
    place: int
    traces: tuple[int, ...]


class Zygote:
    """A warm, jailed interpreter that forks children of one role."""

    def __init__(self, spec: JailSpec, *, uid_base: int, on_spawn: Callable[[int], None], code: int = -1) -> None:
        """Builds the jail; `on_spawn` gets the pid before anything else happens (to put it into a cgroup); `code` is
        the descriptor of the interpreter's code. JailRefused, ZygoteLost."""
        self._control, control_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._broom, broom_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.spec = spec
        self._tmp: _Tmp | None = None
        self._left: list[bytes] = []
        self.pid = _spawn(spec, control_end, broom_end, code)
        try:
            on_spawn(self.pid)
            _limit_waits(self._control, START_TIMEOUT_S)
            _limit_waits(self._broom, REPLY_TIMEOUT_S)
            if spec.namespaces:
                self._expect("unshared")
                _write_maps(self.pid, spec.own_uids, uid_base)
                self._control.send(b"mapped")
            self._expect("ready")
            _limit_waits(self._control, REPLY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def fork(self, descriptors: Sequence[int]) -> Child:
        """A child whose descriptors 0 to 3 are `descriptors`. JailRefused where no process is left, ZygoteLost."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._control.sendmsg([b"F%s" % b" ".join(self._left)], rights)
            self._left = []
            message, ancillary, _, _ = self._control.recvmsg(4096, socket.CMSG_SPACE(4))
        except OSError as error:
            raise ZygoteLost(f"zygote does not answer: {error}") from error
        if not ancillary:
            raise self._refusal(message)
        handle = array.array("i", ancillary[0][2])[0]
        return Child(int(message), _pid_behind(handle), handle)

    def reap(self, child: Child) -> Ending:
        """Waits for a child that ended or was killed, and closes its descriptor."""
        try:
            self._control.send(b"W%d" % child.inner_pid)
            status, cpu_s = json.loads(self._control.recv(4096))
        except (OSError, ValueError) as error:
            raise ZygoteLost(f"zygote does not answer: {error}") from error
        finally:
            os.close(child.pidfd)
        return Ending(status, cpu_s)

    def leave(self, child: Child) -> None:
        """Closes the descriptor of a child that was killed; the next fork waits for it first."""
        os.close(child.pidfd)
        self._left.append(b"%d" % child.inner_pid)

    def sweep(self, size_bytes: int, inodes: int) -> None:
        """Makes /tmp empty and of this size, once nobody uses it: a fresh one, unless it is as it was made."""
        if not (self.spec.namespaces and self.spec.tmp_bytes):
            return
        if self._tmp and self._tmp.bounds == (size_bytes, inodes) and _traces(self._tmp.place) == self._tmp.traces:
            return
        try:
            self._broom.send(b"%d %d" % (size_bytes, inodes))
            answer, places, _, _ = socket.recv_fds(self._broom, 64, 1)
        except OSError as error:
            raise ZygoteLost(f"broom does not answer: {error}") from error
        if answer != b"clean" or not places:
            raise ZygoteLost("broom ended")
        self._forget_tmp()
        self._tmp = _Tmp((size_bytes, inodes), places[0], _traces(places[0]))

    def close(self) -> None:
        """Ends the zygote and, with it, everything in its jail."""
        self._control.close()
        self._broom.close()
        self._forget_tmp()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _forget_tmp(self) -> None:
        if self._tmp:
            os.close(self._tmp.place)
        self._tmp = None

    def _expect(self, word: str) -> None:
        try:
            message = self._control.recv(4096)
        except BlockingIOError as error:
            raise ZygoteLost(f"jail was not built within {START_TIMEOUT_S:g} s; is the machine overloaded?") from error
        except OSError as error:
            raise ZygoteLost(f"jail was not built: {error}") from error
        if not message or word not in json.loads(message):
            raise self._refusal(message)

    def _refusal(self, message: bytes) -> Exception:
        answer: dict[str, Any] = json.loads(message) if message else {}
        if "errno" not in answer:
            return ZygoteLost("zygote ended")
        return JailRefused(answer["error"], answer["errno"])


def _traces(place: int) -> tuple[int, ...]:
    """What changes when somebody writes below `place`, or to its attributes: free blocks and inodes, time of change."""
    space = os.fstatvfs(place)
    return space.f_bfree, space.f_ffree, os.fstat(place).st_ctime_ns


def _limit_waits(end: socket.socket, timeout_s: float) -> None:
    """The kernel's own bound of a blocking call: a timeout of Python's polls before each."""
    bound = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, bound)


def _spawn(spec: JailSpec, control: socket.socket, broom: socket.socket, code: int) -> int:
    """Starts the interpreter by exec with two sockets, nothing on its standard descriptors but our stderr, and an
    environment of its own."""
    high = [fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH) for end in (control, broom)]
    control.close()
    broom.close()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, high[0], CONTROL),
        (os.POSIX_SPAWN_DUP2, high[1], BROOM),
    ]
    if code >= 0:
        actions.append((os.POSIX_SPAWN_DUP2, code, CODE))
    interpreter = os.path.realpath(sys.executable)
    arguments = [interpreter, *FLAGS, "-c", _BOOT, spec.to_json(), _ROOT]
    environment = {**_ENVIRONMENT, **_ONE_THREAD} if spec.packages else _ENVIRONMENT
    try:
        return os.posix_spawn(interpreter, arguments, environment, file_actions=actions)
    finally:
        for descriptor in high:
            os.close(descriptor)


def _write_maps(pid: int, own_uids: bool, uid_base: int) -> None:
    """Maps inner ids to host ids: two of the slot's own range as root, else one to ourselves."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        lines = f"0 {uid_base} 1\n{INNER_UID} {uid_base + 1} 1\n" if own_uids else f"{INNER_UID} {own} 1\n"
        if kind == "gid" and not own_uids:
            _write(f"/proc/{pid}/setgroups", "deny")
        try:
            _write(f"/proc/{pid}/{kind}_map", lines)
        except OSError as error:
            raise JailRefused(f"{kind}_map: {error}", error.errno or 0) from error


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _pid_behind(pidfd: int) -> int:
    """By one call where the kernel has it (6.13), else from what it says of the descriptor."""
    with contextlib.suppress(OSError):
        return int(_PID_INFO.unpack(fcntl.ioctl(pidfd, _GET_PID_INFO, bytes(_PID_INFO.size)))[0])
    descriptor = os.open(f"/proc/self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = os.read(descriptor, 4096).splitlines()
    finally:
        os.close(descriptor)
    pid = next((int(line[4:]) for line in lines if line.startswith(b"Pid:")), -1)
    if pid < 0:
        raise ZygoteLost("no process behind the descriptor")
    return pid
