"""Probes of each isolation layer by doing it, each in a process of its own, with an attempt that must fail.

Run by exec (`python -c`, one thread): prints a JSON object of layer to `null` or `[errno, message]`.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from services.sandbox.jail import rootfs, seal
from services.sandbox.jail.spec import INNER_UID, JailSpec
from services.sandbox.kernel import landlock, libc
from services.sandbox.kernel.cgroups import Group, find_hierarchy, prepare
from services.sandbox.kernel.numbers import numbers
from services.sandbox.kernel.seccomp import FilterPolicy, build_filter

_GUEST_KERNELS: Final = ("gvisor", "kata")
_PROBE_MEMORY_BYTES: Final = 64 * 1024 * 1024


def main() -> None:
    """Probes everything; `sys.argv[1]` is the first of two host uids to map."""
    uid_base = int(sys.argv[1])
    sys.stdout.write(json.dumps({name: _in_child(probe, uid_base) for name, probe in PROBES.items()}))


def _user_namespace(uid_base: int) -> None:
    _enter_user_namespace(libc.CLONE_NEWUSER)


def _namespaces(uid_base: int) -> None:
    kinds = libc.CLONE_NEWNS | libc.CLONE_NEWPID | libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
    _enter_user_namespace(libc.CLONE_NEWUSER | kinds | libc.CLONE_NEWCGROUP)
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        raise OSError(errno.EPERM, f"network interfaces are visible: {' '.join(names)}")


def _nested_pid_namespace(uid_base: int) -> None:
    _enter_user_namespace(libc.CLONE_NEWUSER | libc.CLONE_NEWPID)
    if (pid := libc.fork()) == 0:
        try:
            own = os.open("/proc/self/ns/pid", os.O_RDONLY)
            libc.unshare(libc.CLONE_NEWPID)
            libc.setns(own, libc.CLONE_NEWPID)
            libc.unshare(libc.CLONE_NEWPID)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, os.strerror(status))


def _root(uid_base: int) -> None:
    _enter_user_namespace(libc.CLONE_NEWUSER | libc.CLONE_NEWNS)
    spec = JailSpec(
        role="candidate",
        namespaces=True,
        own_uids=False,
        binds=(),
        hidden=(),
        landlock_abi=0,
        filter_hex="",
        tmp_bytes=65536,
        tmp_inodes=16,
        preload=(),
    )
    rootfs.build_root(spec, rootfs.open_sources(spec))
    for path in ("/etc", "/proc", "/sys", "/home"):
        if os.path.exists(path):
            raise OSError(errno.EEXIST, f"{path} of the host is visible")
    _must_fail(lambda: os.mkdir("/new"), "the root can be written")


def _seccomp(uid_base: int) -> None:
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    libc.install_filter(build_filter(FilterPolicy()))
    _must_fail(lambda: socket.socket(socket.AF_INET), "the filter lets sockets pass")


def _landlock(uid_base: int) -> None:
    abi = landlock.landlock_abi()
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict(landlock.build_ruleset({"/dev": landlock.READ}, abi))
    _must_fail(lambda: os.listdir("/"), "the ruleset lets files pass")


def _pidfd(uid_base: int) -> None:
    os.close(os.pidfd_open(os.getpid()))


def _own_uids(uid_base: int) -> None:
    if os.geteuid():
        raise OSError(errno.EPERM, "only root may map uids that are not its own")
    read_end, write_end = os.pipe()
    if (pid := libc.fork()) == 0:
        libc.unshare(libc.CLONE_NEWUSER)
        os.write(write_end, b"x")
        os._exit(0 if os.read(0, 1) == b"" else 1)
    os.read(read_end, 1)
    try:
        Path(f"/proc/{pid}/uid_map").write_text(f"0 {uid_base} 1\n{INNER_UID} {uid_base + 1} 1\n", encoding="ascii")
    finally:
        os.waitpid(pid, 0)


def _cgroup(uid_base: int) -> None:
    hierarchy = find_hierarchy()
    prepare(hierarchy)
    group = Group(hierarchy, f"probe-{os.getpid()}")
    try:
        pid = libc.fork()
        if pid == 0:
            os.read(0, 1)
            os._exit(0)
        group.add(pid)
        group.set_limits(memory_bytes=_PROBE_MEMORY_BYTES, pids=4)
        group.cpu_s(), group.oom_kills(), group.peak_bytes()  # noqa: B018
        os.waitpid(pid, 0)
    finally:
        group.close()


def _capabilities(uid_base: int) -> None:
    seal.drop_bounding_set()
    libc.capset(0)
    _must_fail(lambda: libc.unshare(libc.CLONE_NEWNET), "a capability is left")


def _guest_kernel(uid_base: int) -> None:
    """gVisor and Kata name themselves in the command line of the kernel that they give to a pod."""
    words = Path("/proc/cmdline").read_text(encoding="utf-8", errors="replace")
    if any(name in words for name in _GUEST_KERNELS):
        return
    raise OSError(errno.ENOSYS, "system calls are served by the node's own kernel, as far as can be seen")


PROBES: Final[dict[str, Callable[[int], None]]] = {
    "user-namespace": _user_namespace,
    "namespaces": _namespaces,
    "nested-pid-namespace": _nested_pid_namespace,
    "root": _root,
    "seccomp": _seccomp,
    "pidfd": _pidfd,
    "landlock": _landlock,
    "capabilities": _capabilities,
    "own-uids": _own_uids,
    "cgroup": _cgroup,
    "guest-kernel": _guest_kernel,
}


def _enter_user_namespace(flags: int) -> None:
    """Unshares and maps the own ids, one to one."""
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare(flags)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{INNER_UID} {uid} 1\n", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{INNER_UID} {gid} 1\n", encoding="ascii")


def _must_fail(attempt: Callable[[], object], words: str) -> None:
    try:
        attempt()
    except OSError:
        return
    raise OSError(errno.ENOTRECOVERABLE, words)


def _in_child(probe: Callable[[int], None], uid_base: int) -> list[object] | None:
    """Runs the probe in a forked child, so that what it gives up stays there."""
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        answer: list[object] | None = None
        try:
            numbers()
            probe(uid_base)
        except OSError as error:
            answer = [error.errno or 0, str(error)]
        finally:
            os.write(write_end, json.dumps(answer).encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    found: list[object] | None = json.loads(text) if text else [errno.ECHILD, "the probe died"]
    return found
