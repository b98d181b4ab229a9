"""Which files of this host the interpreter needs inside a jail, and the digests that name it.

The shared libraries are found by loading every extension module of the standard library once, in a process of its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.sandbox.supervisor.zygote import FLAGS
from smeltkit.errors import BadConfig

_TIMEOUT_S: Final = 60
_LOADER: Final = """
import importlib, json, os, sys
skipped = ("_test", "_xx", "xx", "_tkinter", "readline", "_curses", "nis", "ossaudiodev", "_ctypes_test")
packages, *preload = sys.argv[1:]
for folder in list(sys.path):
    for name in sorted(os.listdir(folder)) if folder.endswith("lib-dynload") else []:
        if name.endswith(".so") and not name.startswith(skipped):
            try:
                importlib.import_module(name.partition(".")[0])
            except ImportError:
                pass
sys.path += [packages] if packages else []
for name in preload:
    importlib.import_module(name)
libraries = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps([[folder for folder in sys.path if os.path.isdir(folder)], sorted(libraries)]))
"""
_HIDDEN: Final = ("site-packages", "dist-packages", "test", "ensurepip", "idlelib", "lib2to3", "turtledemo")
_LOADER_NAME: Final = re.compile(rb"/[\w./-]+/ld[\w.-]+(?=\0)")
_HEADERS_BYTES: Final = 4096
_SUFFIXES: Final = (".py", ".txt")


@dataclass(frozen=True)
class Interpreter:
    """Host paths to bind, folders in them to cover, and the digest of both with the interpreter's version."""

    binds: tuple[str, ...]
    hidden: tuple[str, ...]
    digest: str


@functools.cache
def find_interpreter(packages: str = "", preload: tuple[str, ...] = ()) -> Interpreter:
    """The interpreter that this process runs on, with the folder `packages` as its only third-party packages; BadConfig
    if a module of `preload` cannot be imported."""
    executable = os.path.realpath(sys.executable)
    command = [executable, *FLAGS, "-c", _LOADER, packages, *preload]
    found = subprocess.run(command, capture_output=True, env={}, timeout=_TIMEOUT_S, check=False)
    if found.returncode:
        last_line = found.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise BadConfig(f"the interpreter does not load {', '.join(preload)} from {packages or 'itself'}: {last_line}")
    paths, mapped = json.loads(found.stdout)
    folders = [path for path in paths if not any(path.startswith(other + "/") for other in paths)]
    libraries = [path for path in mapped if not path.startswith(tuple(folder + "/" for folder in folders))]
    binds = (*folders, *(name for path in libraries for name in _names_of(path)))
    covered = (f"{folder}/{name}" for folder in folders for name in _HIDDEN if os.path.isdir(f"{folder}/{name}"))
    hidden = tuple(path for path in covered if not f"{packages}/".startswith(f"{path}/"))
    names = sorted(os.listdir(packages)) if packages else []
    text = json.dumps([sys.version, binds, [os.stat(path).st_size for path in libraries], names])
    return Interpreter(binds, hidden, "sha256:" + hashlib.sha256(text.encode()).hexdigest())


@functools.cache
def executables() -> tuple[str, ...]:
    """The interpreter's program, and the loader that it names: what must be there to start it."""
    program = os.path.realpath(sys.executable)
    with open(program, "rb") as file:
        loader = _LOADER_NAME.search(file.read(_HEADERS_BYTES))
    return (program, loader[0].decode("ascii")) if loader else (program,)


@functools.cache
def judge_digest() -> str:
    """Digest of every source of this service: what a verdict was made by."""
    root = Path(__file__).parent
    whole = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        whole.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + whole.hexdigest()


def _names_of(library: str) -> list[str]:
    """The names in the library's folder under which the loader may look for it."""
    stem = library.partition(".so")[0]
    return sorted(
        str(path)
        for path in Path(library).parent.glob(f"{os.path.basename(stem)}.so*")
        if os.path.samefile(path, library)
    )
