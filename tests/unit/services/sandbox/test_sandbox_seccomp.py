"""The system call filter, interpreted for every number of every architecture."""

from __future__ import annotations

import errno

import pytest
from bpf_machine import run_filter

from services.sandbox.kernel.numbers import AUDIT_ARCHITECTURES, numbers
from services.sandbox.kernel.seccomp import (
    ALLOW,
    ERRNO,
    KILL_PROCESS,
    X32_BIT,
    FilterPolicy,
    build_filter,
    policy_calls,
    policy_rules,
)

ARCHITECTURES = sorted(AUDIT_ARCHITECTURES)
POLICIES = [
    FilterPolicy(),
    FilterPolicy(can_fork=False, can_socket=False),
    FilterPolicy(can_exec=True, can_memfd=True),
]
NUMBERS_MAX = 1000
NEVER = """ptrace process_vm_readv process_vm_writev bpf perf_event_open userfaultfd io_uring_setup io_uring_enter
io_uring_register add_key request_key keyctl mount umount2 move_mount fsopen chroot pivot_root init_module finit_module
delete_module kexec_load clock_settime settimeofday personality quotactl open_by_handle_at memfd_secret move_pages
shmget semget msgget mq_open setuid setgid setgroups reboot swapon pidfd_getfd sched_setaffinity mknodat"""
EPERM = ERRNO | errno.EPERM


def _action(program: bytes, architecture: str, number: int, *arguments: int) -> int:
    return run_filter(program, architecture=AUDIT_ARCHITECTURES[architecture], number=number, arguments=arguments)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_number_gets_what_the_policy_says(architecture: str, policy: FilterPolicy) -> None:
    """R-084: the allow-list and nothing else passes."""
    table, program = numbers(architecture), build_filter(policy, architecture)
    allowed = {table[name] for name in policy_calls(policy) if name in table}
    ruled = {table[rule.name] for rule in policy_rules(policy) if rule.name in table} | {table["clone3"]}
    for number in set(range(NUMBERS_MAX)) - ruled:
        assert _action(program, architecture, number) == (ALLOW if number in allowed else EPERM), number


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dangerous_calls_never_pass(architecture: str) -> None:
    """R-084: whatever the profile allows, these answer EPERM."""
    table = numbers(architecture)
    program = build_filter(FilterPolicy(can_exec=True, can_memfd=True), architecture)
    found = {name: _action(program, architecture, table[name]) for name in NEVER.split() if name in table}
    assert set(found.values()) == {EPERM} and len(found) > 35


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "arguments", "passes"),
    [
        ("clone", (0x11,), True),
        ("clone", (0x11 | 0x10000000,), False),
        ("clone", (0x11 | 0x00020000,), False),
        ("clone", (1 << 32,), False),
        ("unshare", (0x20000000,), True),
        ("unshare", (0x20000000 | 0x10000000,), False),
        ("unshare", (0,), False),
        ("setns", (5, 0x20000000), True),
        ("setns", (5, 0), False),
        ("socket", (1, 1), True),
        ("socket", (2, 1), False),
        ("socket", (1 << 32 | 1, 1), False),
        ("socketpair", (1,), True),
        ("socketpair", (16,), False),
        ("ioctl", (1, 0x5401), True),
        ("ioctl", (1, 0x5412), False),
        ("prctl", (15,), True),
        ("prctl", (8,), False),
        ("prlimit64", (0,), True),
        ("prlimit64", (1,), False),
    ],
)
def test_call_passes_by_its_arguments(architecture: str, name: str, arguments: tuple[int, ...], passes: bool) -> None:
    program = build_filter(FilterPolicy(), architecture)
    assert _action(program, architecture, numbers(architecture)[name], *arguments) == (ALLOW if passes else EPERM)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_forking_only_threads_are_made(architecture: str) -> None:
    program, clone = build_filter(FilterPolicy(can_fork=False), architecture), numbers(architecture)["clone"]
    assert _action(program, architecture, clone, 0x10000) == ALLOW
    assert _action(program, architecture, clone, 0x11) == EPERM


def test_other_architecture_ends_the_process() -> None:
    """R-084: the numbers of another architecture mean other calls."""
    program = build_filter(FilterPolicy(), "x86_64")
    assert run_filter(program, architecture=AUDIT_ARCHITECTURES["aarch64"], number=0) == KILL_PROCESS


def test_x32_numbers_are_refused() -> None:
    program = build_filter(FilterPolicy(), "x86_64")
    assert _action(program, "x86_64", X32_BIT | numbers("x86_64")["read"]) == EPERM


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clone3_sends_the_library_back_to_clone(architecture: str) -> None:
    number = numbers(architecture)["clone3"]
    assert _action(build_filter(FilterPolicy(), architecture), architecture, number) == ERRNO | errno.ENOSYS
