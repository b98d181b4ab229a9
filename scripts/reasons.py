"""Writes contracts/interface/reasons.yaml from the error tree; with --check, fails if the checked-in file differs."""

from __future__ import annotations

import sys
from pathlib import Path

from smeltkit.errors import all_errors

PATH = Path(__file__).resolve().parent.parent / "contracts" / "interface" / "reasons.yaml"


def render() -> str:
    """The registry as YAML: reason, meaning, codes, whether a retry makes sense."""
    lines = ["# Every reason an error can carry. Generated from smeltkit/errors.py by `make proto`; do not edit."]
    for reason, cls in sorted(all_errors().items()):
        meaning = (cls.__doc__ or "").strip().splitlines()[0]
        lines += [
            f"{reason}:",
            f"  meaning: {meaning!r}",
            f"  grpc: {cls.grpc_status}",
            f"  http: {cls.http_status}",
            f"  exit: {cls.exit_code}",
            f"  retryable: {str(cls.retryable).lower()}",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes, or compares."""
    if "--check" not in sys.argv:
        PATH.write_text(render())
        return 0
    if PATH.read_text() != render():
        print("contracts/interface/reasons.yaml is stale; run make proto")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
