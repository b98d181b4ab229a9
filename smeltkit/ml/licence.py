"""The licence of a model, as its files declare it: an SPDX tag, a model card's header, or a well-known text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_READ_CHARS: Final = 4096
_TAG: Final = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+ ()-]{1,100})")
_CARD: Final = re.compile(r"\A---\n(?:.*\n)*?license:[ \t]*([A-Za-z0-9.+-]{1,100})[ \t]*\n")
_CARD_NAME: Final = re.compile(r"\A---\n(?:.*\n)*?license_name:[ \t]*([A-Za-z0-9.+-]{1,100})[ \t]*\n")
_TEXTS: Final = (
    ("Apache-2.0", re.compile(r"Apache License\s+Version 2\.0")),
    ("MIT", re.compile(r"\bMIT License\b|Permission is hereby granted, free of charge, to any person")),
    ("BSD-3-Clause", re.compile(r"BSD 3-Clause License")),
)
_SPDX: Final = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "MIT",
        "BSD-3-Clause",
        "BSD-2-Clause",
        "CC-BY-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-SA-4.0",
        "CC0-1.0",
        "GPL-3.0",
        "OpenRAIL",
    )
}


def licence_of(folder: Path) -> str | None:
    """The licence of the model in `folder` as an SPDX expression or `LicenseRef-NAME`; None if no file declares one."""
    text = _head(folder / "LICENSE")
    if tag := _TAG.search(text):
        return tag[1].strip()
    card = _head(folder / "README.md")
    if declared := _CARD.search(card):
        named = _CARD_NAME.search(card) if declared[1] == "other" else None
        name = named[1] if named else declared[1]
        return _SPDX.get(name.lower(), f"LicenseRef-{name}")
    known = next((name for name, pattern in _TEXTS if pattern.search(text)), None)
    return known or ("LicenseRef-LICENSE" if text.strip() else None)


def _head(path: Path) -> str:
    """The beginning of a text file; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_READ_CHARS)
