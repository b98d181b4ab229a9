"""The system call filter: an allow-list as data, compiled to classic BPF.

What is not listed answers EPERM, so that an honest program sees an OSError and stays judgeable. The filter is installed
in the zygote and inherited, hence it also lets pass what the zygote needs to seal a child; without capabilities those
calls can do nothing. It does not protect against bugs in the calls that it lets pass.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.sandbox.kernel.libc import CLONE_NEWPID
from services.sandbox.kernel.numbers import AUDIT_ARCHITECTURES, numbers

ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
KILL_PROCESS: Final = 0x80000000
X32_BIT: Final = 0x40000000

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16

FILES: Final = """read write open openat close stat fstat lstat newfstatat statx lseek pread64 pwrite64 readv writev preadv
pwritev preadv2 pwritev2 access faccessat faccessat2 pipe pipe2 dup dup2 dup3 fcntl flock fsync fdatasync truncate
ftruncate getdents getdents64 getcwd chdir fchdir rename renameat renameat2 mkdir mkdirat rmdir creat link linkat unlink
unlinkat symlink symlinkat readlink readlinkat chmod fchmod fchmodat umask utime utimes utimensat futimesat statfs
fstatfs fallocate fadvise64 sendfile copy_file_range close_range sync_file_range""".split()
MEMORY: Final = "mmap mprotect munmap brk mremap msync mincore madvise membarrier".split()
SIGNALS: Final = """rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause
alarm getitimer setitimer restart_syscall""".split()
WAITING: Final = """poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4 nanosleep clock_nanosleep sched_yield
futex set_robust_list get_robust_list""".split()
PROCESS: Final = """getpid gettid getppid getpgrp getpgid setpgid getsid setsid getuid geteuid getgid getegid getgroups
getresuid getresgid exit exit_group wait4 waitid set_tid_address rseq getrusage getrlimit setrlimit times sysinfo uname
gettimeofday time clock_gettime clock_getres getrandom getcpu getpriority sched_getaffinity sched_getparam
sched_getscheduler sched_get_priority_max sched_get_priority_min pidfd_open""".split()
SOCKETS: Final = """sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown bind connect listen accept accept4
getsockname getpeername setsockopt getsockopt""".split()
SEALING: Final = "setresuid setresgid capset landlock_create_ruleset landlock_add_rule landlock_restrict_self".split()
FORKING: Final = "fork vfork kill tgkill tkill".split()

NAMESPACE_FLAGS: Final = 0x7E020080
CLONE_THREAD: Final = 0x10000
_AF_UNIX: Final = 1
_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
_PRCTLS: Final = (1, 3, 4, 15, 16, 38, 39)
"""PDEATHSIG, dumpable (get, set), name (set, get), no_new_privs (set, get)."""


@dataclass(frozen=True)
class Rule:
    """A call that passes when one argument has one of these values, or has none of these bits, or has this bit."""

    name: str
    argument: int
    values: tuple[int, ...] = ()
    forbidden_bits: int = 0
    required_bits: int = 0


@dataclass(frozen=True, kw_only=True)
class FilterPolicy:
    """What differs between profiles and levels."""

    can_fork: bool = True
    can_exec: bool = False
    can_memfd: bool = False
    """Anonymous files are memory outside of every process: only where a cgroup counts them."""


def policy_calls(policy: FilterPolicy) -> list[str]:
    """The calls that pass whatever their arguments are."""
    groups = [FILES, MEMORY, SIGNALS, WAITING, PROCESS, SOCKETS, SEALING]
    groups += [FORKING] if policy.can_fork else []
    groups += [["execve", "execveat"]] if policy.can_exec else []
    groups += [["memfd_create"]] if policy.can_memfd else []
    return [name for group in groups for name in group]


def policy_rules(policy: FilterPolicy) -> list[Rule]:
    """The calls that pass with certain arguments."""
    clone = Rule("clone", 0, forbidden_bits=NAMESPACE_FLAGS)
    if not policy.can_fork:
        clone = Rule("clone", 0, forbidden_bits=NAMESPACE_FLAGS, required_bits=CLONE_THREAD)
    return [
        clone,
        Rule("unshare", 0, (CLONE_NEWPID,)),
        Rule("setns", 1, (CLONE_NEWPID,)),
        Rule("socket", 0, (_AF_UNIX,)),
        Rule("socketpair", 0, (_AF_UNIX,)),
        Rule("ioctl", 1, _IOCTLS),
        Rule("prctl", 0, _PRCTLS),
        Rule("prlimit64", 0, (0,)),
    ]


def build_filter(policy: FilterPolicy, architecture: str = "") -> bytes:
    """The program for `architecture` (default: this machine's) as bytes of 8-byte instructions."""
    table = numbers(architecture)
    code = [_load(_OFFSET_ARCHITECTURE)]
    code += [_jump(_JUMP_EQUAL, _architecture_number(architecture), 1, 0), _give(KILL_PROCESS), _load(_OFFSET_NUMBER)]
    code += [_jump(_JUMP_AT_LEAST, X32_BIT, 0, 1), _give(ERRNO | errno.EPERM)]
    for low, high in _ranges(table[name] for name in policy_calls(policy) if name in table):
        code += [_jump(_JUMP_AT_LEAST, low, 0, 2), _jump(_JUMP_AT_LEAST, high + 1, 1, 0), _give(ALLOW)]
    for rule in policy_rules(policy):
        if rule.name in table:
            body = _rule_body(rule)
            code += [_jump(_JUMP_EQUAL, table[rule.name], 0, len(body)), *body]
    if "clone3" in table:
        code += [_jump(_JUMP_EQUAL, table["clone3"], 0, 1), _give(ERRNO | errno.ENOSYS)]
    code.append(_give(ERRNO | errno.EPERM))
    return b"".join(code)


def _rule_body(rule: Rule) -> list[bytes]:
    """Ends in a return on every path; the high word of the argument must be zero."""
    offset = _OFFSET_ARGUMENTS + 8 * rule.argument
    deny, allow = _give(ERRNO | errno.EPERM), _give(ALLOW)
    body = [_load(offset + 4), _jump(_JUMP_EQUAL, 0, 1, 0), deny, _load(offset)]
    if rule.forbidden_bits:
        body += [_jump(_JUMP_ANY_BIT, rule.forbidden_bits, 0, 1), deny]
    if rule.required_bits:
        body += [_jump(_JUMP_ANY_BIT, rule.required_bits, 1, 0), deny]
    for value in rule.values:
        body += [_jump(_JUMP_EQUAL, value, 0, 1), allow]
    return [*body, deny if rule.values else allow]


def _ranges(values: Iterable[int]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if merged and merged[-1][1] == value - 1:
            merged[-1] = (merged[-1][0], value)
        else:
            merged.append((value, value))
    return merged


def _architecture_number(architecture: str) -> int:
    import platform

    return AUDIT_ARCHITECTURES[architecture or platform.machine()]


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LOAD_WORD, 0, 0, offset)


def _jump(test: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", test, if_true, if_false, value)


def _give(action: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, action)
