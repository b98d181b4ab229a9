"""What is wrong with an image, by its description and its files alone: nothing of it is run."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.images.catalogue import REVISION, Image, labels

MIB = 1024 * 1024
COMPILERS = frozenset(
    {
        "as",
        "c++",
        "c89",
        "c99",
        "cc",
        "clang",
        "cmake",
        "cpp",
        "g++",
        "gcc",
        "gold",
        "ld",
        "make",
        "ninja",
        "nvcc",
        "rustc",
    }
)
_COMMIT = re.compile(r"[0-9a-f]{40}(-dirty)?")
INSTALLERS = frozenset({"pip", "pip3", "uv", "conda"})
_PROGRAMS = ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin", "opt/smelt/bin")
_MAY_BE_WRITTEN = frozenset({"tmp", "var/tmp", "run/lock", "dev/shm", "dev/mqueue"})


def unpacked_bytes(root: Path) -> int:
    """Bytes of all files below `root`, each counted once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def mistakes(image: Image, root: Path, described: Mapping[str, Any]) -> Iterator[str]:
    """One line for each promise that the image breaks."""
    yield from _description(image, described.get("config", {}))
    yield from _programs(root)
    yield from _rights(root)
    size_mib = unpacked_bytes(root) / MIB
    if size_mib > image.budget_mib:
        yield f"{size_mib:.0f} MiB unpacked; its budget is {image.budget_mib} MiB"
    torch = next(root.glob("opt/*/lib/python3*/site-packages/torch"), None)
    if (torch is not None) != image.has_torch:
        yield "torch is inside" if torch else "torch is missing"
    package = root.glob(f"opt/smelt/lib/python3*/site-packages/{image.module.replace('.', '/')}/__main__.py")
    if next(package, None) is None:
        yield f"python -m {image.module} would not start: it is not inside"
    for source in root.glob("opt/smelt/lib/python3*/site-packages/triton/backends/nvidia/driver.c"):
        if not source.with_suffix(".compiled").exists():
            yield "Triton would look for a C compiler on its first GPU: its driver was not compiled"
    if (root / "run/machine").exists() and any((root / "run/machine").iterdir()):
        yield "settings of the machine that built it are inside, below /run/machine"


def _description(image: Image, config: Mapping[str, Any]) -> Iterator[str]:
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(config.get("User", ""))):
        yield f"it runs as {config.get('User') or 'root'!r}; a node can prove only a number that is not 0"
    if config.get("Entrypoint") or config.get("Cmd") != ["python", "-m", image.module]:
        yield f"it runs {config.get('Entrypoint')} {config.get('Cmd')}; it must be python -m {image.module}"
    found = config.get("Labels") or {}
    for name, value in labels().items():
        is_right = _COMMIT.fullmatch(found.get(name, "")) if name == REVISION else found.get(name) == value
        if not is_right:
            yield f"label {name} is {found.get(name)!r}, not {value!r}; build it again"


def _programs(root: Path) -> Iterator[str]:
    for folder in _PROGRAMS:
        place = root / folder
        for path in sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else ():
            name = re.sub(r"^x86_64-linux-gnu-|-?\d[\d.]*$", "", path.name)
            if name in COMPILERS or path.name in COMPILERS:
                yield f"a compiler is inside: {folder}/{path.name}"
            if name in INSTALLERS:
                yield f"an installer is inside: {folder}/{path.name}"


def _rights(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder, name)
            mode, inside = path.lstat().st_mode, path.relative_to(root).as_posix()
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                yield f"/{inside} runs with another's rights (mode {stat.S_IMODE(mode):o})"
            is_open = mode & stat.S_IWOTH and not stat.S_ISLNK(mode) and not stat.S_ISCHR(mode)
            if is_open and inside not in _MAY_BE_WRITTEN:
                yield f"/{inside} may be written by anybody (mode {stat.S_IMODE(mode):o})"
