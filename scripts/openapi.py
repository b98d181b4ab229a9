"""Writes contracts/interface/openapi.yaml from the HTTP edge; with --check, fails if the checked-in file differs."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from gateway.http.openapi import document

PATH = Path(__file__).resolve().parent.parent / "contracts" / "interface" / "openapi.yaml"


def main(arguments: list[str]) -> int:
    """0 if the file was written, or is up to date with --check; 1 if it is stale."""
    head = "# The HTTP edge. Generated from gateway/http by `make proto`; do not edit.\n"
    text = head + yaml.safe_dump(document(), sort_keys=False, allow_unicode=False, width=120)
    if "--check" not in arguments:
        PATH.write_text(text)
        return 0
    if PATH.read_text() == text:
        return 0
    print("contracts/interface/openapi.yaml is stale; run make proto")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
