"""R-108: each exit status of a program that we run has its own error, and one that nobody declared is an error too."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smeltkit.errors import BadTokenizer, InternalError, OutOfMemory, SmeltError
from smeltkit.exits import REFUSED, check_exit


def status_of(code: str) -> subprocess.CompletedProcess[str]:
    """A real program that ended."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (f"import sys; print('odd merges', file=sys.stderr); sys.exit({REFUSED})", BadTokenizer, "refuses: odd merges"),
        ("import no_such_library", InternalError, "status 1, which it is not known to give: ModuleNotFoundError"),
        ("import os; os._exit(77)", InternalError, "status 77, which it is not known to give: no message"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", OutOfMemory, "smaller model"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", InternalError, "by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", InternalError, "by SIGTERM"),
    ],
)
def test_each_way_to_end_has_its_error(code: str, error: type[SmeltError], match: str) -> None:
    """A refusal, a crash of the interpreter, an unknown status and signals are told apart."""
    done = status_of(code)
    with pytest.raises(error, match=match):
        check_exit("the program", done.returncode, {REFUSED: BadTokenizer}, done.stderr)


def test_status_0_is_no_error() -> None:
    """Whatever was written."""
    done = status_of("import sys; print('a warning', file=sys.stderr)")
    check_exit("the program", done.returncode, {}, done.stderr)
