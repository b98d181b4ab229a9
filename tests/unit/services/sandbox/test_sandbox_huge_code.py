"""Code in huge pages: one sealed copy for all, and nothing is changed where the kernel has none to give."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from services.sandbox import code_file

PROGRAM = """
import ctypes, json, mmap, os, resource
from services.sandbox.code_file import NONE, shared_code
from services.sandbox.jail import huge_code
from services.sandbox.kernel import libc

def faults_of_a_child():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    pid = libc.fork()
    if pid == 0:
        json.loads(json.dumps(sorted(str(n * n) for n in range(1000))))
        compile("def f(n: int) -> int: return [n, 'a', 1.5]", "c", "exec")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

def mappings():
    found = []
    with open("/proc/self/maps") as maps:
        for place, rights, _, _, inode, *_ in map(str.split, maps):
            start, end = (int(part, 16) for part in place.split("-"))
            if start < span.end and span.start < end:
                found.append([rights, inode])
    return found

span = huge_code.code_span()
found = {"pages": max(0, span.end - span.start) // huge_code.HUGE_BYTES}
found |= {"before": mappings(), "shared": faults_of_a_child()}
code = shared_code()
found["after"] = mappings()
if code != NONE:
    found |= {"moved": faults_of_a_child(), "refused": []}
    for attempt in (
        lambda: os.pwrite(code, b"x", 0),
        lambda: os.ftruncate(code, 0),
        lambda: mmap.mmap(code, 0, prot=mmap.PROT_WRITE),
        lambda: libc.syscall(10, span.start, 4096, 3) if os.uname().machine == "x86_64" else os.pwrite(code, b"x", 0),
    ):
        try:
            attempt()
        except OSError as error:
            found["refused"].append(error.errno)
    other = os.memfd_create("other")
    os.write(other, b"x" * (span.end - span.start))
    try:
        huge_code.use_code(other)
    except OSError as error:
        found |= {"other": str(error), "still": mappings()}
print(json.dumps(found))
"""


def test_all_share_one_copy_of_the_code_without_faults_and_none_may_write_to_it() -> None:
    """Only what was read-only and of one file is replaced, and only by the same bytes."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, check=True)
    found = json.loads(ended.stdout)
    if found["pages"]:
        assert all(rights.startswith("r-") for rights, _ in found["before"])
        assert len({inode for _, inode in found["before"]}) == 1
    if "moved" in found:
        assert {rights for rights, _ in found["after"]} == {"r-xs"}
        assert found["moved"] < found["shared"] - 5 * found["pages"]
        assert found["refused"] == [errno.EPERM, errno.EPERM, errno.EPERM, errno.EACCES]
        assert "other code" in found["other"]
        assert found["still"] == found["after"]
    else:
        assert found["after"] == found["before"]


def test_a_kernel_without_memory_files_costs_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert code_file.shared_code.__wrapped__() == code_file.NONE
