"""The system call filter: the allow-list beside this file, compiled to classic BPF.

What is not listed answers EPERM, so that an honest program sees an OSError and stays judgeable. The filter is installed
in the zygote and inherited, hence it also lets pass what the zygote needs to seal a child; without capabilities those
calls can do nothing. It does not protect against bugs in the calls that it lets pass.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.sandbox.kernel.libc import CLONE_NEWPID
from services.sandbox.kernel.numbers import AUDIT_ARCHITECTURES, numbers

ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
KILL_PROCESS: Final = 0x80000000
X32_BIT: Final = 0x40000000

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16


NAMESPACE_FLAGS: Final = 0x7E020080
CLONE_THREAD: Final = 0x10000
_AF_UNIX: Final = 1
_ARCH_SET_FS: Final = 0x1002
"""Where a program that starts keeps its thread's storage."""
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
    can_socket: bool = True
    """UNIX sockets: without a root of its own, the host's socket files can be reached, so only pairs are left."""
    can_exec: bool = False
    can_memfd: bool = False
    """Anonymous files are memory outside of every process: only where a cgroup counts them."""


def policy_calls(policy: FilterPolicy) -> list[str]:
    """The calls that pass whatever their arguments are."""
    switches = {"forking": policy.can_fork, "exec": policy.can_exec, "memfd": policy.can_memfd}
    return [name for group, names in allowed_groups().items() if switches.get(group, True) for name in names]


@functools.cache
def allowed_groups() -> Mapping[str, list[str]]:
    """The checked-in allow-list: group to names."""
    return read_groups("allowed.txt")


def read_groups(file: str) -> dict[str, list[str]]:
    """Group to names of a list beside this file."""
    groups: dict[str, list[str]] = {}
    for line in Path(__file__).with_name(file).read_text(encoding="ascii").splitlines():
        group, *names = line.split()
        if group != "#":
            groups.setdefault(group, []).extend(names)
    return groups


def policy_rules(policy: FilterPolicy) -> list[Rule]:
    """The calls that pass with certain arguments."""
    clone = Rule("clone", 0, forbidden_bits=NAMESPACE_FLAGS)
    if not policy.can_fork:
        clone = Rule("clone", 0, forbidden_bits=NAMESPACE_FLAGS, required_bits=CLONE_THREAD)
    rules = [
        clone,
        Rule("unshare", 0, (CLONE_NEWPID,)),
        Rule("setns", 1, (CLONE_NEWPID,)),
        Rule("socketpair", 0, (_AF_UNIX,)),
        Rule("ioctl", 1, _IOCTLS),
        Rule("prctl", 0, _PRCTLS),
        Rule("prlimit64", 0, (0,)),
    ]
    if policy.can_socket:
        rules.append(Rule("socket", 0, (_AF_UNIX,)))
    if policy.can_exec:
        rules.append(Rule("arch_prctl", 0, (_ARCH_SET_FS,)))
    return rules


def build_filter(policy: FilterPolicy, architecture: str = "") -> bytes:
    """The program for `architecture` (default: this machine's) as bytes of 8-byte instructions."""
    return assemble(policy_calls(policy), policy_rules(policy), architecture)


def assemble(
    allowed: Iterable[str], rules: Iterable[Rule], architecture: str = "", *, otherwise: int = ERRNO | errno.EPERM
) -> bytes:
    """A program that lets `allowed` pass, then asks `rules`, and answers `otherwise` to all else, ENOSYS to clone3."""
    table = numbers(architecture)
    code = [_load(_OFFSET_ARCHITECTURE)]
    code += [_jump(_JUMP_EQUAL, _architecture_number(architecture), 1, 0), _give(KILL_PROCESS), _load(_OFFSET_NUMBER)]
    code += [_jump(_JUMP_AT_LEAST, X32_BIT, 0, 1), _give(ERRNO | errno.EPERM)]
    for low, high in _ranges(table[name] for name in allowed if name in table):
        code += [_jump(_JUMP_AT_LEAST, low, 0, 2), _jump(_JUMP_AT_LEAST, high + 1, 1, 0), _give(ALLOW)]
    for rule in rules:
        if rule.name in table:
            body = _rule_body(rule)
            code += [_jump(_JUMP_EQUAL, table[rule.name], 0, len(body)), *body]
    if "clone3" in table:
        code += [_jump(_JUMP_EQUAL, table["clone3"], 0, 1), _give(ERRNO | errno.ENOSYS)]
    code.append(_give(otherwise))
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
    return AUDIT_ARCHITECTURES[architecture or platform.machine()]


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LOAD_WORD, 0, 0, offset)


def _jump(test: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", test, if_true, if_false, value)


def _give(action: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, action)
