"""Control groups of both versions, on folders that look like theirs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.sandbox.kernel.cgroups import Group, Hierarchy, find_hierarchy, prepare


def _proc(folder: Path, groups: str, mounts: str) -> Path:
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    return proc


def test_version_one_is_used_where_its_controllers_are(tmp_path: Path) -> None:
    names = ("memory", "pids", "cpuacct")
    mounts = "".join(f"1 2 0:3 / {tmp_path}/{name} rw - cgroup cgroup rw,{name}\n" for name in names)
    proc = _proc(tmp_path, "4:memory:/a/b\n3:pids:/\n2:cpuacct:/\n0::/\n", mounts)
    found = find_hierarchy(proc)
    assert (found.version, found.folders["memory"]) == (1, tmp_path / "memory/a/b")


@pytest.mark.parametrize(("controllers", "is_usable"), [("cpu memory pids", True), ("", False)])
def test_version_two_is_used_only_with_its_controllers(tmp_path: Path, controllers: str, is_usable: bool) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cgroup.controllers").write_text(controllers)
    proc = _proc(tmp_path, "0::/own\n", f"1 2 0:3 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    if is_usable:
        assert find_hierarchy(proc) == Hierarchy(2, {"": tmp_path / "own"})
    else:
        with pytest.raises(OSError, match="memory and pids are needed"):
            find_hierarchy(proc)


@pytest.mark.parametrize("version", [1, 2])
def test_group_reads_and_writes_its_version(tmp_path: Path, version: int) -> None:
    controllers = ("memory", "pids", "cpuacct") if version == 1 else ("",)
    for name in controllers:
        (tmp_path / name).mkdir(exist_ok=True)
    group = Group(Hierarchy(version, {name: tmp_path / name for name in controllers}), "0")
    files = {
        1: {
            "memory/smelt-sandbox-0/memory.usage_in_bytes": "4096\n",
            "memory/smelt-sandbox-0/memory.limit_in_bytes": "",
            "memory/smelt-sandbox-0/memory.memsw.limit_in_bytes": "",
            "memory/smelt-sandbox-0/memory.max_usage_in_bytes": "8192\n",
            "memory/smelt-sandbox-0/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            "cpuacct/smelt-sandbox-0/cpuacct.usage": "1500000000\n",
            "pids/smelt-sandbox-0/pids.max": "",
        },
        2: {
            "smelt-sandbox-0/memory.current": "4096\n",
            "smelt-sandbox-0/memory.max": "",
            "smelt-sandbox-0/memory.swap.max": "",
            "smelt-sandbox-0/memory.peak": "8192\n",
            "smelt-sandbox-0/memory.events": "low 0\noom 3\noom_kill 2\n",
            "smelt-sandbox-0/cpu.stat": "usage_usec 1500000\nuser_usec 1\n",
            "smelt-sandbox-0/pids.max": "",
        },
    }[version]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (group.usage_bytes(), group.peak_bytes(), group.oom_kills(), group.cpu_s()) == (4096, 8192, 2, 1.5)
    group.set_limits(memory_bytes=1 << 20, pids=7)
    written = {name.rpartition("/")[2]: (tmp_path / name).read_text() for name in files}
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
    assert (written[limit], written["pids.max"]) == ("1048576", "7")


def test_only_groups_of_ended_services_are_removed(tmp_path: Path) -> None:
    """A neighbour that is just starting keeps its empty group."""
    own, dead = f"smelt-sandbox-{os.getpid()}-1", "smelt-sandbox-4194999-1"
    for name in (own, dead, "other"):
        (tmp_path / name).mkdir()
    prepare(Hierarchy(1, {"memory": tmp_path}))
    assert {path.name for path in tmp_path.iterdir()} == {own, "other"}


def test_version_two_is_prepared_before_its_groups_get_controllers(tmp_path: Path) -> None:
    """A group of version 2 gives its controllers to groups below it only once it holds no process itself."""
    for name in ("cgroup.procs", "cgroup.subtree_control"):
        (tmp_path / name).write_text("")
    own = os.getpid()
    moved = tmp_path / f"smelt-sandbox-service-{own}" / "cgroup.procs"
    (tmp_path / "cgroup.procs").write_text(f"{own}\n")
    prepare(Hierarchy(2, {"": tmp_path}))
    assert moved.read_text() == str(own)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_moved_process_of_version_two_finds_the_folder_it_came_from(tmp_path: Path) -> None:
    """Else each probe would go one level deeper."""
    below = tmp_path / "own" / "smelt-sandbox-service-7"
    below.mkdir(parents=True)
    for folder in (below, below.parent):
        (folder / "cgroup.controllers").write_text("memory pids")
    proc = _proc(tmp_path, "0::/own/smelt-sandbox-service-7\n", f"1 2 0:3 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert find_hierarchy(proc) == Hierarchy(2, {"": tmp_path / "own"})
