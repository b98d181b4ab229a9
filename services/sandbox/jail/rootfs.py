"""The root of a jail: a tiny read-only tmpfs with the interpreter's files bound in, four device nodes and /tmp.

No /proc, /sys, /etc, /home and no shell. Host files stay reachable only through what is bound.
"""

from __future__ import annotations

import os
from typing import Final

from services.sandbox.jail.spec import JailSpec
from services.sandbox.kernel import libc
from services.sandbox.kernel.numbers import numbers

DEVICES: Final = ("null", "zero", "full", "random", "urandom")
SCRATCH: Final = "/scratch/tmp"
"""Where the file system behind /tmp is mounted. Landlock looks at the folder above a mount point, never at the point,
so a rule for that folder holds for every file system that the broom mounts."""
_STAGE: Final = "/tmp"
_KEPT_FLAGS: Final = {
    os.ST_NOSUID: libc.MS_NOSUID,
    os.ST_NODEV: libc.MS_NODEV,
    os.ST_NOEXEC: libc.MS_NOEXEC,
    os.ST_NOATIME: 1024,
    os.ST_NODIRATIME: 2048,
    os.ST_RELATIME: 1 << 21,
}


def open_sources(spec: JailSpec) -> dict[str, int]:
    """Path to O_PATH descriptor of all that will be bound: opened while the process may still walk the host's tree."""
    paths = [*spec.binds, *(f"/dev/{name}" for name in DEVICES)]
    return {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths}


def build_root(spec: JailSpec, sources: dict[str, int]) -> None:
    """Replaces the process's root by a new one; the old one is detached. `sources` are closed."""
    libc.mount("none", "/", "", libc.MS_REC | libc.MS_PRIVATE)
    libc.mount("none", _STAGE, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "size=256k,nr_inodes=2k,mode=755")
    os.umask(0o022)  # candidates have another uid and must pass the folders made here, whatever the service inherited
    for path, descriptor in sources.items():
        is_device = path.startswith("/dev/")
        _bind(descriptor, _STAGE + path, 0 if is_device else libc.MS_RDONLY | libc.MS_NODEV)
        os.close(descriptor)
    for path in spec.hidden:
        libc.mount("none", _STAGE + path, "tmpfs", libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV, "size=4k,mode=755")
    os.makedirs(_STAGE + SCRATCH)
    os.symlink(SCRATCH, _STAGE + "/tmp")
    os.chdir(_STAGE)
    libc.syscall(numbers()["pivot_root"], b".", b".")
    libc.umount(".")
    os.chdir("/")
    libc.mount("none", "/", "", libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV)
    mount_tmp(spec.tmp_bytes, spec.tmp_inodes)


def mount_tmp(size_bytes: int, inodes: int) -> None:
    """A fresh, empty /tmp with these bounds, for everybody; nothing is mounted when `size_bytes` is 0."""
    if size_bytes:
        data = f"size={size_bytes},nr_inodes={inodes},mode=1777"
        libc.mount("none", SCRATCH, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC, data)


def _bind(descriptor: int, target: str, flags: int) -> None:
    _make_place(target, os.path.isdir(f"/proc/self/fd/{descriptor}"))
    libc.mount(f"/proc/self/fd/{descriptor}", target, "", libc.MS_BIND | libc.MS_REC)
    present = os.statvfs(target).f_flag
    kept = sum(flag for bit, flag in _KEPT_FLAGS.items() if present & bit)
    libc.mount("none", target, "", libc.MS_REMOUNT | libc.MS_BIND | libc.MS_NOSUID | flags | kept)


def _make_place(target: str, is_folder: bool) -> None:
    os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
    if not is_folder and not os.path.exists(target):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
