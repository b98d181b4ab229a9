"""Code in huge pages: moved while it runs, shared by children, and left alone where the kernel has none to give."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, os, resource
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
try:
    huge_code.move_code()
    found |= {"after": mappings(), "moved": faults_of_a_child()}
except OSError as error:
    found |= {"refused": str(error)}
print(json.dumps(found))
"""


def test_children_share_moved_code_without_faults_and_none_may_write_to_it() -> None:
    """Only what was read-only and of one file is replaced; what the kernel refuses to move stays, and it says so."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, check=True)
    found = json.loads(ended.stdout)
    if found["pages"]:
        assert all(rights.startswith("r-") for rights, _ in found["before"])
        assert len({inode for _, inode in found["before"]}) == 1
    if found["pages"] and "refused" not in found:
        assert {rights for rights, _ in found["after"]} == {"r-xp"}
        assert found["moved"] < found["shared"] - 5 * found["pages"]
    else:
        assert "syscall" in found.get("refused", "syscall")
