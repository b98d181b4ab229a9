"""A warm interpreter in a jail that only forks: `main` is what the supervisor starts by exec.

It never receives a job, so memory that a later child inherits holds nothing of an earlier one. The one exception to
"processes start by spawn": this process has a single thread and forks.
"""

from __future__ import annotations

import _socket
import contextlib
import gc
import importlib
import json
import os
import random
import signal
import struct
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Final, NoReturn

from services.sandbox.jail import rootfs, seal
from services.sandbox.jail.broom import sweep_for_ever
from services.sandbox.jail.hot_pages import find_hot_pages, pin
from services.sandbox.jail.huge_code import use_code
from services.sandbox.jail.spec import BROOM, CODE, CONTROL, FDS_OF_CHILD, JailSpec
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
_REHEARSALS: Final = 20
"""Enough for the interpreter to specialize the code."""
_ROLES: Final = {
    "candidate": ("services.sandbox.guest.runner", "services.sandbox.guest.rehearsal"),
    "judge": ("services.sandbox.judge.process", "services.sandbox.judge.rehearsal"),
}
"""What a child does, and its rehearsal."""


def main() -> None:
    """Builds the jail described by `sys.argv[1]`, reports `ready`, and forks until its socket closes."""
    spec = JailSpec.from_json(sys.argv[1])
    numbers()
    control = _socket.socket(fileno=CONTROL)
    os.setsid()
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    role, rehearsal = map(importlib.import_module, _ROLES[spec.role])
    gc.disable()
    if spec.packages:
        sys.path.append(spec.packages)
        os.environ["PYTHONPATH"] = spec.packages
    for name in spec.preload:
        importlib.import_module(name)
    for _ in range(_REHEARSALS):
        rehearsal.rehearse()
    random.seed(0)
    with contextlib.suppress(OSError):
        use_code(CODE)
        os.close(CODE)
    _forget_ourselves()
    hot_pages = _find_hot_pages(spec, role.serve, rehearsal)
    slot_pid_namespace = ruleset = -1
    try:
        if spec.namespaces:
            slot_pid_namespace = _enter_namespaces(spec, control)
            _pin(hot_pages)
            seal.seal_zygote(spec)
        else:
            ruleset = seal.prepare_ruleset(spec)
            _pin(hot_pages)
            seal.set_constant_limits()
        os.close(BROOM)
    except OSError as error:
        control.send(json.dumps({"errno": error.errno, "error": str(error)}).encode())
        os._exit(1)
    control.send(b'{"ready": true}')

    def become_child(received: list[int]) -> NoReturn:
        try:
            _become(spec, ruleset, received, role.serve)
        finally:
            os._exit(_CHILD_FAILED)

    _fork_for_ever(control, slot_pid_namespace, become_child)
    os._exit(0)


def _become(spec: JailSpec, ruleset: int, received: list[int], serve: Callable[[], NoReturn]) -> NoReturn:
    seal.seal(spec, ruleset)
    seal.take_descriptors(received)
    serve()


def _find_hot_pages(spec: JailSpec, serve: Callable[[], NoReturn], rehearsal: ModuleType) -> set[int]:
    """The pages that a child writes to, and those that a fork touches; empty where the kernel does not say."""
    scout = spec._replace(own_uids=False)  # the inner uid means another user of the host, outside of the jail
    with contextlib.suppress(OSError), rehearsal.rehearsal_channel() as channel:
        return find_hot_pages(lambda: _become(scout, -1, [0, 1, 2, channel], serve)) | find_hot_pages(_fork_once)
    return set()


def _fork_once() -> None:
    """One turn of the loop below, with a child that ends at once."""
    supervisor, control = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{FDS_OF_CHILD}i", *range(FDS_OF_CHILD)))]
    supervisor.sendmsg([b"F"], rights)
    supervisor.send(b"W0")
    supervisor.shutdown(_socket.SHUT_WR)
    _fork_for_ever(control, -1, lambda received: os._exit(0))


def _pin(pages: set[int]) -> None:
    if pages:
        with contextlib.suppress(OSError):
            pin(pages)


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
        _become_broom(control, namespace)
    return namespace


def _wait_and_exit() -> NoReturn:
    """The process outside the slot's pid namespace: keeps the descriptors of nobody and dies with its child."""
    os.closerange(0, seal.DESCRIPTORS)
    os.wait()
    os._exit(0)


def _become_broom(control: _socket.socket, namespace: int) -> NoReturn:
    control.close()
    os.close(namespace)
    broom = _socket.socket(fileno=BROOM)
    try:
        sweep_for_ever(broom)
    finally:
        os._exit(0)


def _forget_ourselves() -> None:
    """Takes our modules and paths out of what children inherit by name, and freezes the rest."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("services", "smeltkit")]:
        del sys.modules[name]
    root = sys.path.pop(0)
    for path in [path for path in sys.path_importer_cache if path.startswith(root)]:
        del sys.path_importer_cache[path]
    sys.argv[:] = [""]
    os.environ.pop("LD_BIND_NOW", None)
    gc.collect()
    gc.freeze()


def _fork_for_ever(control: _socket.socket, namespace: int, become_child: Callable[[list[int]], NoReturn]) -> None:
    """`F PID...` with four descriptors reaps children that were ended, forks one, and answers with its pidfd; `W PID`
    reaps one and answers with `[wait status, CPU seconds]`; pids count in the slot's namespace. Returns when the socket
    closes."""
    while True:
        message, ancillary, _, _ = control.recvmsg(_MESSAGE_MAX_BYTES, _socket.CMSG_SPACE(4 * FDS_OF_CHILD))
        if not message:
            return
        if message[:1] == b"W":
            control.send(_reap(int(message[1:])))
            continue
        for ended in message[1:].split():
            os.waitpid(int(ended), 0)
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
