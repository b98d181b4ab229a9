"""Exit statuses of the programs that we run, translated one by one; a status that nobody declared is an error (R-108).

A program says its own refusals by statuses that the interpreter, the dynamic linker and the shell never use, so that a
missing library is not taken for a refused model.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final

from smeltkit.errors import InternalError, OutOfMemory, SmeltError

REFUSED: Final = 65
"""The program looked at its input and refuses it; the last line on standard error says why (EX_DATAERR)."""


def check_exit(program: str, status: int, known: Mapping[int, type[SmeltError]], output: str) -> None:
    """Returns if `status` (negative: minus the signal's number, as `subprocess` gives it) is 0, else raises.

    The error is that of `known`; OutOfMemory for SIGKILL, which only the kernel sends here; InternalError for any other
    signal or status. The last line of `output` is in the message.
    """
    if status == 0:
        return
    said = (output.strip().splitlines() or ["no message"])[-1]
    if status in known:
        raise known[status](f"{program} refuses: {said}")
    if status == -signal.SIGKILL:
        raise OutOfMemory(f"{program} was killed, most likely for want of memory; free some, or take a smaller model")
    how = f"by {_signal_name(-status)}" if status < 0 else f"with status {status}, which it is not known to give"
    raise InternalError(f"{program} ended {how}: {said}")


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
