"""Which code this is: part of every lineage, and of every key under which a result is stored for reuse."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final = ("smeltkit", "services")
"""Packages whose source decides what a stage produces."""


@cache
def code_revision(packages: tuple[str, ...] = PACKAGES) -> str:
    """Twelve hex digits over every Python source of `packages`: equal sources give equal revisions, on any machine."""
    hasher = hashlib.sha256()
    for package in packages:
        for root in _folders(package):
            for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
                name, content = f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()
                hasher.update(f"{name}:{len(content)}:".encode() + content)
    return hasher.hexdigest()[:12]


def _folders(package: str) -> list[Path]:
    spec = find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
