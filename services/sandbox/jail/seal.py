"""What a forked child gives up before it sees any foreign byte, and the bounds it takes from its job."""

from __future__ import annotations

import os
import resource
import signal
from typing import Final

from services.sandbox.jail.rootfs import SCRATCH
from services.sandbox.jail.spec import FDS_OF_CHILD, INNER_UID, JailSpec
from services.sandbox.kernel import landlock, libc

STACK_BYTES: Final = 8 * 1024 * 1024
DESCRIPTORS: Final = 256
_ALL_CAPABILITIES: Final = 64
_KEPT_CAPABILITIES: Final = (1 << 7) | (1 << 21)
"""SETUID and SYS_ADMIN within the jail's own user namespace: what sealing a child needs."""


def drop_bounding_set() -> None:
    """Empties the bounding set: no exec can bring a capability back."""
    for capability in range(_ALL_CAPABILITIES):
        try:
            libc.prctl(libc.PR_CAPBSET_DROP, capability)
        except OSError:
            return


def set_constant_limits() -> None:
    """Bounds that no job changes: no core, no locked memory, 256 descriptors, 8 MiB stack."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))


def take_descriptors(received: list[int]) -> None:
    """Makes `received` the descriptors 0 to 3 and closes all others."""
    for wanted, descriptor in enumerate(received):
        os.dup2(descriptor, wanted)
    os.closerange(FDS_OF_CHILD, DESCRIPTORS)


def prepare_ruleset(spec: JailSpec) -> int:
    """Descriptor of the Landlock ruleset for children, built once; -1 where Landlock is missing."""
    return landlock.build_ruleset(_allowed_paths(spec), spec.landlock_abi) if spec.landlock_abi else -1


def seal_zygote(spec: JailSpec) -> None:
    """What a zygote with namespaces gives up for itself and all children, so that none pays for it again: its group,
    capabilities but those that `seal` needs, files, calls, being traced. Its broom must run: behind Landlock nobody
    mounts."""
    if spec.own_uids:
        os.setresgid(INNER_UID, INNER_UID, INNER_UID)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    drop_bounding_set()
    set_constant_limits()
    libc.capset(_KEPT_CAPABILITIES)
    libc.prctl(libc.PR_SET_DUMPABLE, 0)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    ruleset = prepare_ruleset(spec)
    if ruleset >= 0:
        landlock.restrict(ruleset)
        os.close(ruleset)
    libc.install_filter(bytes.fromhex(spec.filter_hex))


def seal(spec: JailSpec, ruleset: int) -> None:
    """Own process group, own uid, no capability, not traceable; without namespaces Landlock and the filter too.

    With namespaces the zygote's own seal is inherited, and its death ends the child's. Whoever leaves uid 0 loses every
    capability by that.
    """
    os.setpgid(0, 0)
    if spec.own_uids:
        os.setresuid(INNER_UID, INNER_UID, INNER_UID)
    else:
        libc.drop_capabilities()
    if not spec.namespaces:
        libc.prctl(libc.PR_SET_DUMPABLE, 0)
        libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
        drop_bounding_set()
        libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
        if ruleset >= 0:
            landlock.restrict(ruleset)
        libc.install_filter(bytes.fromhex(spec.filter_hex))


def _allowed_paths(spec: JailSpec) -> dict[str, int]:
    """Path to Landlock rights of a child."""
    allowed = {"/dev/null": landlock.READ_WRITE_NODE, "/dev/urandom": landlock.READ_FILE}
    if not spec.namespaces:
        readable = {path: landlock.READ if os.path.isdir(path) else landlock.READ_FILE for path in spec.binds}
        return {**allowed, **readable}
    allowed = {"/": landlock.READ, "/dev": landlock.READ_WRITE_NODE}
    allowed |= dict.fromkeys(spec.executables, landlock.READ_FILE | landlock.EXECUTE)
    if spec.tmp_bytes:
        allowed[os.path.dirname(SCRATCH)] = landlock.all_file_access(spec.landlock_abi) & ~landlock.EXECUTE
    return allowed


def set_job_limits(*, cpu_s: float, memory_bytes: int, pids: int, file_bytes: int) -> None:
    """Backstops of the supervisor's own watch: whole CPU seconds, address space, processes, file size."""
    whole_s = int(cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (whole_s, whole_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NPROC, (pids, pids))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
