"""A warm interpreter in a jail that only forks: `main` is what the supervisor starts by exec.

It never receives a job, so memory that a later child inherits holds nothing of an earlier one. The one exception to
"processes start by spawn": this process has a single thread and forks.
"""

from __future__ import annotations

import _socket
import gc
import importlib
import json
import os
import random
import signal
import struct
import sys
from collections.abc import Callable
from typing import Final, NoReturn

from services.sandbox.jail import rootfs, seal
from services.sandbox.jail.broom import sweep_for_ever
from services.sandbox.jail.spec import BROOM, CONTROL, FDS_OF_CHILD, JailSpec
from services.sandbox.kernel import libc
from services.sandbox.kernel.numbers import numbers

NAMESPACES: Final = (
    libc.CLONE_NEWUSER
    | libc.CLONE_NEWNS
    | libc.CLONE_NEWPID
    | libc.CLONE_NEWNET
    | libc.CLONE_NEWIPC
    | libc.CLONE_NEWUTS
    | libc.CLONE_NEWCGROUP
)
_MESSAGE_MAX_BYTES: Final = 4096
_CHILD_FAILED: Final = 70
_ROLES: Final = {"candidate": "services.sandbox.guest.runner", "judge": "services.sandbox.judge.process"}


def main() -> None:
    """Builds the jail described by `sys.argv[1]`, reports `ready`, and forks until its socket closes."""
    spec = JailSpec.from_json(sys.argv[1])
    numbers()
    control = _socket.socket(fileno=CONTROL)
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve: Callable[[], NoReturn] = importlib.import_module(_ROLES[spec.role]).serve
    if spec.packages:
        sys.path.append(spec.packages)
    for name in spec.preload:
        importlib.import_module(name)
    random.seed(0)
    slot_pid_namespace = ruleset = -1
    try:
        if spec.namespaces:
            slot_pid_namespace = _enter_namespaces(spec, control)
            seal.seal_zygote(spec)
        else:
            seal.set_constant_limits()
            ruleset = seal.prepare_ruleset(spec)
    except OSError as error:
        control.send(json.dumps({"errno": error.errno, "error": str(error)}).encode())
        os._exit(1)
    _forget_ourselves()
    control.send(b'{"ready": true}')

    def become_child(received: list[int]) -> NoReturn:
        try:
            seal.seal(spec, ruleset)
            seal.take_descriptors(received)
            serve()
        finally:
            os._exit(_CHILD_FAILED)

    _fork_for_ever(control, slot_pid_namespace, become_child)


def _enter_namespaces(spec: JailSpec, control: _socket.socket) -> int:
    """Returns, in a child that is pid 1 of the slot's pid namespace, the descriptor of that namespace."""
    if spec.own_uids:
        os.setgroups([])
    libc.unshare(NAMESPACES)
    control.send(b'{"unshared": true}')
    if control.recv(_MESSAGE_MAX_BYTES) != b"mapped":
        os._exit(1)
    if libc.fork():
        _wait_and_exit()
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    sources = rootfs.open_sources(spec)
    if spec.own_uids:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    rootfs.build_root(spec, sources)
    if spec.tmp_bytes and libc.fork() == 0:
        _become_broom(spec, control, namespace)
    return namespace


def _wait_and_exit() -> NoReturn:
    """The process outside the slot's pid namespace: keeps the descriptors of nobody and dies with its child."""
    os.closerange(0, seal.DESCRIPTORS)
    os.wait()
    os._exit(0)


def _become_broom(spec: JailSpec, control: _socket.socket, namespace: int) -> NoReturn:
    control.close()
    os.close(namespace)
    broom = _socket.socket(fileno=BROOM)
    try:
        sweep_for_ever(broom, spec.tmp_bytes, spec.tmp_inodes)
    finally:
        os._exit(0)


def _forget_ourselves() -> None:
    """Takes our modules and paths out of what children inherit by name, and freezes the rest."""
    os.closerange(BROOM, BROOM + 1)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("services", "smeltkit")]:
        del sys.modules[name]
    root = sys.path.pop(0)
    for path in [path for path in sys.path_importer_cache if path.startswith(root)]:
        del sys.path_importer_cache[path]
    sys.argv[:] = [""]
    os.environ.pop("LD_BIND_NOW", None)
    gc.collect()
    gc.freeze()
    gc.disable()


def _fork_for_ever(control: _socket.socket, namespace: int, become_child: Callable[[list[int]], NoReturn]) -> NoReturn:
    """`F` with four descriptors forks a child and answers with its pidfd; `W PID` reaps it and answers with
    `[wait status, CPU seconds]`; the pid counts in the slot's namespace."""
    while True:
        message, ancillary, _, _ = control.recvmsg(_MESSAGE_MAX_BYTES, _socket.CMSG_SPACE(4 * FDS_OF_CHILD))
        if not message:
            os._exit(0)
        if message[:1] == b"W":
            control.send(_reap(int(message[1:])))
            continue
        received = list(struct.unpack(f"{FDS_OF_CHILD}i", ancillary[0][2]))
        if namespace >= 0:
            libc.setns(namespace, libc.CLONE_NEWPID)
            libc.unshare(libc.CLONE_NEWPID)
        try:
            pid = libc.fork()
        except OSError as error:
            control.send(json.dumps({"errno": error.errno, "error": str(error)}).encode())
            continue
        if pid == 0:
            become_child(received)
        for descriptor in received:
            os.close(descriptor)
        handle = os.pidfd_open(pid)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", handle))]
        control.sendmsg([str(pid).encode()], rights)
        os.close(handle)


def _reap(pid: int) -> bytes:
    _, status, usage = os.wait4(pid, 0)
    return json.dumps([status, usage.ru_utime + usage.ru_stime]).encode()
