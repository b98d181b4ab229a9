"""How a test program can end other than by passing."""

from __future__ import annotations

from typing import Final

DETAIL_MAX_CHARS: Final = 500


class Refused(Exception):
    """The tests themselves are unusable: the caller's mistake, no verdict."""


class Failed(Exception):
    """The verdict is not `passed`."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict
        self.detail = detail[:DETAIL_MAX_CHARS]
