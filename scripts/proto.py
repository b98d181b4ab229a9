"""Generates the stubs under proto/python/smelt from proto/smelt; with --check, fails if the checked-in ones differ.

Runs in `.venv-proto`, which holds the oldest supported protobuf compiler: code from a newer one refuses older runtimes.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO, OUT = ROOT / "proto", ROOT / "proto" / "python"


def generate(out: Path) -> None:
    """Writes the stubs of every proto file below `out`."""
    import grpc_tools

    includes = [PROTO, Path(grpc_tools.__file__).parent / "_proto"]
    command = [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{path}" for path in includes)]
    for flag in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out"):
        command.append(f"--{flag}={out}")
    files = sorted(str(path) for path in (PROTO / "smelt").rglob("*.proto"))
    subprocess.run([*command, *files], check=True)
    (out / "smelt" / "py.typed").touch()


def main() -> int:
    """Generates, or compares and says which files are stale."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        if "--check" not in sys.argv:
            shutil.rmtree(OUT / "smelt", ignore_errors=True)
            shutil.copytree(fresh / "smelt", OUT / "smelt")
            return 0
        names = {str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file()}
        kept = {
            str(path.relative_to(OUT))
            for path in (OUT / "smelt").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        stale = sorted(
            name
            for name in names | kept
            if name not in names or name not in kept or not filecmp.cmp(fresh / name, OUT / name, False)
        )
        for name in stale:
            print(f"stale stub: {name}; run make proto")
        return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
