"""From what the host gives to how each slot is built."""

from __future__ import annotations

import os

from services.sandbox.code_file import shared_code
from services.sandbox.config import UIDS_PER_SLOT, SandboxConfig
from services.sandbox.doctor import Isolation
from services.sandbox.interpreter import Interpreter, executables, find_interpreter, judge_digest
from services.sandbox.jail.spec import JailSpec
from services.sandbox.kernel.cgroups import Hierarchy, find_hierarchy, prepare
from services.sandbox.kernel.landlock import landlock_abi
from services.sandbox.kernel.seccomp import FilterPolicy, build_filter
from services.sandbox.policy import TMP_INODES, Level, Limits
from services.sandbox.profiles import BARE, Profile, find_profiles
from services.sandbox.supervisor.spec import SlotSpec


def slot_specs(config: SandboxConfig, isolation: Isolation, level: Level) -> list[SlotSpec]:
    """One spec a slot at `level`; also removes control groups that earlier lives left."""
    hierarchy = _hierarchy(_built_as(isolation, level))
    return [_slot_spec(index, config, isolation, level, hierarchy) for index in range(config.slot_count)]


def missing_layers(isolation: Isolation, level: Level) -> tuple[str, ...]:
    """Layers that the best level has and a slot at `level` lacks."""
    level = _built_as(isolation, level)
    left_out = {
        Level.JAIL: (),
        Level.ROOTLESS: ("cgroup",),
        Level.CONFINED: ("user-namespace", "namespaces", "nested-pid-namespace", "root", "own-uids", "cgroup"),
    }[level]
    return tuple(dict.fromkeys((*left_out, *isolation.missing)))


def _slot_spec(
    index: int, config: SandboxConfig, isolation: Isolation, level: Level, hierarchy: Hierarchy | None
) -> SlotSpec:
    cores = sorted(os.sched_getaffinity(0))
    profiles = find_profiles(config)
    return SlotSpec(
        index=index,
        core=cores[index % len(cores)],
        level=str(level),
        missing_layers=missing_layers(isolation, level),
        candidates={
            name: _jail_spec("candidate", isolation, level, Limits().tmp_bytes, profile)
            for name, profile in profiles.items()
        },
        judge=_jail_spec("judge", isolation, level, 0, profiles[BARE]),
        uid_base=config.uid_base + UIDS_PER_SLOT * index,
        code=shared_code(),
        hierarchy=hierarchy,
        group_name=f"{os.getpid()}-{index}",
        judge_digest=judge_digest(),
        profile_digests={name: _interpreter(profile).digest for name, profile in profiles.items()},
    )


def _interpreter(profile: Profile) -> Interpreter:
    return find_interpreter(profile.folder, profile.preload)


def _jail_spec(role: str, isolation: Isolation, level: Level, tmp_bytes: int, profile: Profile) -> JailSpec:
    interpreter = _interpreter(profile)
    level = _built_as(isolation, level)
    has_root = level > Level.CONFINED
    can_exec = has_root and profile.can_exec
    programs = executables() if can_exec else ()
    policy = FilterPolicy(can_fork=has_root, can_socket=has_root, can_exec=can_exec, can_memfd=level is Level.JAIL)
    return JailSpec(
        role=role,
        namespaces=has_root,
        own_uids=has_root and isolation.has("own-uids"),
        binds=(*interpreter.binds, *programs),
        hidden=interpreter.hidden,
        landlock_abi=landlock_abi() if isolation.has("landlock") else 0,
        filter_hex=build_filter(policy).hex(),
        tmp_bytes=tmp_bytes,
        tmp_inodes=TMP_INODES,
        preload=profile.preload,
        packages=profile.folder,
        executables=programs,
    )


def _built_as(isolation: Isolation, level: Level) -> Level:
    return isolation.built_as if level is Level.GUEST_KERNEL else level


def _hierarchy(level: Level) -> Hierarchy | None:
    if level is not Level.JAIL:
        return None
    hierarchy = find_hierarchy()
    prepare(hierarchy)
    return hierarchy
