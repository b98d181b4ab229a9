"""How a process of the platform ends: a refusal is one line and a code, our own mistake is not hidden."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smeltkit.config import environment

PROGRAM = """
import sys
from smeltkit.errors import StoreDenied
from smeltkit.service import run_service

async def serve():
    if sys.argv[1]:
        raise {"denied": StoreDenied("the key is refused"), "mistake": KeyError("ours")}[sys.argv[1]]

run_service("importer", serve)
"""


@pytest.mark.parametrize(
    ("ends", "variables", "code", "says"),
    [
        ("", {}, 0, ""),
        ("denied", {}, 6, "the key is refused"),
        ("", {"SMELT_TELEMETRY_LOG_LEVEL": "LOUD"}, 2, "SMELT_TELEMETRY_*: log_level='LOUD' is no level"),
        ("mistake", {}, 1, "Traceback"),
    ],
)
def test_a_refusal_ends_the_process_with_its_code_and_one_line(
    ends: str, variables: dict[str, str], code: int, says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ends], env=environment(variables), capture_output=True, text=True, timeout=60
    )
    output = done.stdout + done.stderr
    assert (done.returncode, says in output) == (code, True), output
    assert ends == "mistake" or len(output.splitlines()) == (1 if code else 0), output
