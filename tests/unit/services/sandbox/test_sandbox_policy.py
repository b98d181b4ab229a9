"""Bounds, levels, profiles and what is admitted."""

from __future__ import annotations

import dataclasses

import pytest
from sandbox_service import packages_folder

from services.sandbox.admission import admit, check_level
from services.sandbox.config import SandboxConfig
from services.sandbox.doctor import NEEDED, assess, require
from services.sandbox.job import Job, from_wire, to_wire
from services.sandbox.policy import Level, Limits
from services.sandbox.pool import is_worth_a_rerun
from services.sandbox.profiles import Profile, choose_profile, find_profiles
from services.sandbox.verdict import Record, Verdict
from smeltkit.errors import BadCode, BadConfig, IsolationTooWeak, UnsupportedOption

JOB = Job(code=b"def f(): pass", tests="assert f()", exports=("f",))
ALL_PRESENT = dict.fromkeys(NEEDED[Level.JAIL])


@pytest.mark.parametrize(
    "given",
    [{"cpu_s": 0.0}, {"cpu_s": 301}, {"wall_s": 901}, {"memory_bytes": 1}, {"pids": 0}, {"output_bytes": 1 << 30}],
)
def test_limit_out_of_range_names_its_range(given: dict[str, float]) -> None:
    with pytest.raises(BadCode, match="allowed are"):
        Limits.from_request(given)


def test_wall_limit_follows_the_cpu_limit() -> None:
    assert Limits.from_request({"cpu_s": 2.0}).wall_s == 11.0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"code": b"x" * (1 << 20 | 1), "form": "program"}, BadCode),
        ({"tests": ""}, BadCode),
        ({"form": "poem"}, BadCode),
        ({"form": "check"}, BadCode),
        ({"exports": ("not a name",)}, BadCode),
        ({"exports": ()}, BadCode),
        ({"expected_stdout": b"x"}, UnsupportedOption),
        ({"form": "stdio"}, UnsupportedOption),
        ({"form": "unittest", "tests": "import numpy as np\n"}, UnsupportedOption),
        ({"form": "asserts", "tests": "from scipy import stats\nassert f()"}, UnsupportedOption),
        ({"form": "calls"}, BadCode),
        ({"form": "calls", "entry_point": "f", "tolerance": 2.0}, BadCode),
        ({"tolerance": 0.1}, UnsupportedOption),
        ({"form": "calls", "entry_point": "f", "seed": "1"}, UnsupportedOption),
        ({"form": "stdio", "tests": "", "exports": (), "seed": "1"}, UnsupportedOption),
    ],
)
def test_job_that_cannot_be_judged_is_refused(change: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        admit(dataclasses.replace(JOB, **change))  # type: ignore[arg-type]


SCIENCE = Profile(name="science", modules=frozenset(("numpy",)))


def test_inside_mode_is_refused_where_it_cannot_be_honoured() -> None:
    with pytest.raises(UnsupportedOption):
        admit(JOB, "inside")


@pytest.mark.parametrize(
    ("tests", "mode", "expected"),
    [
        ("import unittest, math", "", "split"),
        ("import unittest\nimport os.path as path", "", "split"),
        ("import unittest", "inside", "inside"),
        ("import unittest\nfrom unittest.mock import patch", "", "inside"),
        ("import unittest\nfrom unittest import (\n    TestCase,\n    mock,\n)", "", "inside"),
        ("import unittest\nfrom unittest import mock", "split", "split"),
        ("import unittest\nfrom numpy.testing import assert_allclose", "", "inside"),
        ("import unittest\nTEXT = '''\nfrom there on\nimport goods\n'''", "", "split"),
    ],
)
def test_unittest_runs_outside_unless_it_patches_or_imports_packages(tests: str, mode: str, expected: str) -> None:
    """R-082: split first; inside only where the tests need it or the request says so."""
    assert admit(dataclasses.replace(JOB, form="unittest", tests=tests), mode, SCIENCE).mode == expected


@pytest.mark.parametrize(
    ("change", "mode"), [({}, ""), ({"form": "unittest"}, "split"), ({"tests": "import torch"}, "")]
)
def test_packages_need_a_profile_and_a_form_that_runs_inside(change: dict[str, str], mode: str) -> None:
    with pytest.raises(UnsupportedOption):
        admit(dataclasses.replace(JOB, **{"tests": "import numpy", **change}), mode, SCIENCE)  # type: ignore[arg-type]


def test_profile_of_packages_is_configuration() -> None:
    with packages_folder("pytest") as packages:
        profiles = find_profiles(SandboxConfig(science_packages=packages, science_preload="numpy,pandas"))
    assert profiles["science"].preload[-2:] == ("numpy", "pandas") and profiles["science"].has("pytest")


@pytest.mark.parametrize("folder", ["/tmp/packages", "/proc/self", "/nowhere"])
def test_folder_that_cannot_hold_packages_is_refused(folder: str) -> None:
    with pytest.raises(BadConfig, match="science_packages"):
        find_profiles(SandboxConfig(science_packages=folder))


def test_unknown_profile_and_level_are_refused() -> None:
    with pytest.raises(UnsupportedOption):
        choose_profile(find_profiles(SandboxConfig()), "science")
    with pytest.raises(BadConfig, match="confined, rootless, jail"):
        Level.named("none")


def test_job_survives_the_way_to_the_supervisor() -> None:
    job = dataclasses.replace(JOB, code=bytes(range(256)), limits=Limits(cpu_s=1.5))
    assert from_wire(to_wire(job)) == job


@pytest.mark.parametrize(
    ("missing", "level"),
    [
        ((), Level.JAIL),
        (("cgroup",), Level.ROOTLESS),
        (("own-uids", "cgroup", "landlock"), Level.ROOTLESS),
        (("user-namespace", "root"), Level.CONFINED),
        (("seccomp",), None),
        (("root", "landlock"), None),
    ],
)
def test_level_follows_from_the_layers(missing: tuple[str, ...], level: Level | None) -> None:
    assert assess({**ALL_PRESENT, **{name: [1, "no"] for name in missing}}).level is level


def test_ceiling_lowers_the_level_reached() -> None:
    assert assess({**ALL_PRESENT}, Level.CONFINED).level is Level.CONFINED


def test_too_weak_a_host_is_refused_with_error_and_remedy() -> None:
    """R-084: the message names layer, errno and what to do."""
    isolation = assess({**ALL_PRESENT, "user-namespace": [28, "No space left on device"]})
    with pytest.raises(IsolationTooWeak, match="user-namespace: ENOSPC No space .*max_user_namespaces") as raised:
        require(isolation, Level.ROOTLESS)
    assert raised.value.details == {"required": "rootless", "reached": "confined", "missing": "user-namespace"}


def test_request_may_ask_for_more_than_there_is() -> None:
    check_level("rootless", Level.JAIL)
    with pytest.raises(IsolationTooWeak):
        check_level("jail", Level.ROOTLESS)


@pytest.mark.parametrize(
    "setting", [{"level": "open"}, {"slots": -1}, {"uid_base": 0}, {"queue_per_slot": 0}, {"probe_period_s": 0.0}]
)
def test_bad_setting_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(BadConfig):
        SandboxConfig(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "cpu_s", "waited_share", "again"),
    [
        (Verdict.TIMEOUT_CPU, 10.0, 0.0, True),
        (Verdict.WRONG, 8.0, 0.0, True),
        (Verdict.WRONG, 1.0, 0.9, False),
        (Verdict.TIMEOUT_WALL, 0.1, 0.1, False),
        (Verdict.TIMEOUT_WALL, 0.1, 0.5, True),
        (Verdict.PASSED, 9.9, 0.9, False),
        (Verdict.INFRA, 9.9, 0.9, False),
    ],
)
def test_only_a_failure_near_a_limit_is_run_again(
    verdict: Verdict, cpu_s: float, waited_share: float, again: bool
) -> None:
    """R-085: a sleeper buys no second run, a starved candidate gets one."""
    assert is_worth_a_rerun(Record(verdict=verdict, cpu_s=cpu_s, waited_share=waited_share)) is again


@pytest.mark.parametrize(
    ("absent", "ceiling", "level", "built_as"),
    [
        ((), Level.GUEST_KERNEL, Level.GUEST_KERNEL, Level.JAIL),
        (("landlock", "namespaces", "cgroup"), Level.GUEST_KERNEL, Level.GUEST_KERNEL, Level.CONFINED),
        (("cgroup",), Level.GUEST_KERNEL, Level.GUEST_KERNEL, Level.ROOTLESS),
        (("guest-kernel",), Level.GUEST_KERNEL, Level.JAIL, Level.JAIL),
        (("guest-kernel", "landlock", "namespaces"), Level.GUEST_KERNEL, None, Level.CONFINED),
        (("pidfd",), Level.GUEST_KERNEL, None, Level.CONFINED),
        ((), Level.ROOTLESS, Level.ROOTLESS, Level.ROOTLESS),
    ],
)
def test_guest_kernel_is_a_level_above_the_best_that_works_inside(
    absent: tuple[str, ...], ceiling: Level, level: Level | None, built_as: Level
) -> None:
    """R-084: a kernel that is not the node's is named, and slots are built as well as it allows."""
    answers: dict[str, list[object] | None] = dict.fromkeys((*ALL_PRESENT, "guest-kernel"))
    isolation = assess({**answers, **{name: [38, "no"] for name in absent}}, ceiling)
    assert (isolation.level, isolation.built_as) == (level, built_as)
    assert "guest-kernel" not in isolation.missing
    assert str(Level.GUEST_KERNEL) == "guest-kernel" and Level.named("guest-kernel") is Level.GUEST_KERNEL
