"""Run as a Python process starts: its time of day is off by the seconds in the file STEPPED_CLOCK, as they change.

Stepped are time.time, time.time_ns and datetime.now, which is all that our code and its Python libraries ask. Monotonic
clocks and what is written in C (gRPC, TLS) go on as before, as they would on a machine whose clock is set.
"""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

_FILE = Path(os.environ["STEPPED_CLOCK"])
_TIME, _TIME_NS, _DATETIME = time.time, time.time_ns, datetime.datetime


def offset_s() -> int:
    """By how much the clock is fast."""
    return int(_FILE.read_text() or "0")


class SteppedDatetime(_DATETIME):
    """datetime.datetime with the stepped clock."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """As datetime.now."""
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        """As datetime.utcnow."""
        return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


time.time = lambda: _TIME() + offset_s()
time.time_ns = lambda: _TIME_NS() + offset_s() * 10**9
datetime.datetime = SteppedDatetime  # type: ignore[misc]
