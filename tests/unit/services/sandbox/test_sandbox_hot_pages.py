"""Pages that forked children write to: found, and copied by the fork once they are pinned."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PAGES = 256
PROGRAM = f"""
import ctypes, json, os, resource, sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from services.sandbox.jail.hot_pages import find_hot_pages, pin
from services.sandbox.kernel import libc

memory = mmap(-1, {PAGES} * {PAGE_BYTES}, MAP_PRIVATE | MAP_ANONYMOUS)
memory.madvise({mmap.MADV_NOHUGEPAGE})
first = ctypes.addressof(ctypes.c_char.from_buffer(memory)) // {PAGE_BYTES}

def write(step):
    for page in range(0, {PAGES}, step):
        memory[page * {PAGE_BYTES}] = 1

def faults_of_a_child():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    pid = libc.fork()
    if pid == 0:
        write(2)
        os._exit(0)
    os.waitpid(pid, 0)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

write(1)
hot = {{page - first for page in find_hot_pages(lambda: write(2)) if first <= page < first + {PAGES}}}
shared = faults_of_a_child()
try:
    pin({{first + page for page in hot}})
    copied = faults_of_a_child()
except OSError as error:
    copied = str(error)
print(json.dumps([sorted(hot), shared, copied]))
"""


def test_pages_that_a_child_writes_to_are_found_and_then_copied_by_the_fork() -> None:
    """Where the kernel refuses to pin, it says so and children share as usual."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, check=True)
    hot, shared, copied = json.loads(found.stdout)
    assert hot == list(range(0, PAGES, 2))
    assert shared >= PAGES // 2
    assert "syscall" in copied if isinstance(copied, str) else copied <= shared - PAGES // 2 + PAGES // 8
