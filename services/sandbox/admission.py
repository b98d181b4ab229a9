"""What is accepted for judging: a request's fields become a checked job, or a typed refusal."""

from __future__ import annotations

import re
from typing import Final

from services.sandbox.job import Job
from services.sandbox.policy import CODE_MAX_BYTES, STDIN_MAX_BYTES, TESTS_MAX_BYTES, Level
from smeltkit.errors import BadCode, IsolationTooWeak, UnsupportedOption

JUDGED_FORMS: Final = ("check", "asserts", "unittest", "calls")
MODES: Final = ("", "split", "inside", "stdio")
EXPORTS_MAX: Final = 256
SEED_MAX_CHARS: Final = 1024
_NEEDS_INSIDE: Final = re.compile(
    r"^\s*(from\s+unittest\s+import\s+.*\bmock\b|(import|from)\s+unittest\.mock\b)", re.MULTILINE
)


def admit(job: Job, mode: str = "") -> Job:
    """`job` if it can be judged in `mode` (empty: wherever its form allows); BadCode, UnsupportedOption."""
    for name, limit in (("code", CODE_MAX_BYTES), ("stdin", STDIN_MAX_BYTES), ("expected_stdout", STDIN_MAX_BYTES)):
        _check_size(name, len(getattr(job, name)), limit)
    for name in ("tests", "preamble", "setup"):
        _check_size(name, len(getattr(job, name).encode("utf-8", "surrogatepass")), TESTS_MAX_BYTES)
    _check_size("seed", len(job.seed), SEED_MAX_CHARS)
    if job.is_program:
        _admit_program(job, mode)
    else:
        _admit_tests(job, mode)
    return job


def check_level(min_level: str, reached: Level) -> None:
    """IsolationTooWeak if a request asks for more than this service reached."""
    if min_level and Level.named(min_level) > reached:
        raise IsolationTooWeak(
            f"the request needs level {min_level}, this sandbox reaches {reached}; ask for {reached} or run "
            "the service where more is allowed",
            details={"required": min_level, "reached": str(reached)},
        )


def _admit_program(job: Job, mode: str) -> None:
    if mode not in ("", "stdio"):
        raise UnsupportedOption(f"mode {mode!r} has no meaning for the form stdio; leave it out or set stdio")
    if job.tests or job.preamble or job.setup or job.entry_point or job.exports or job.tolerance:
        raise UnsupportedOption(
            "the form stdio compares output; tests, preamble, setup, entry point, exports and tolerance are unused"
        )
    if job.form == "program" and job.expected_stdout:
        raise UnsupportedOption("expected_stdout has no effect when nothing is compared; choose how to compare")


def _admit_tests(job: Job, mode: str) -> None:
    if job.form not in JUDGED_FORMS:
        raise BadCode(f"form {job.form!r} is unknown; choose one of {', '.join((*JUDGED_FORMS, 'stdio'))}")
    if mode not in ("", "split"):
        raise UnsupportedOption(f"mode {mode!r} is not available for the form {job.form}; leave it out or set split")
    if job.form == "unittest" and _NEEDS_INSIDE.search(job.tests):
        raise UnsupportedOption(
            "tests that patch the candidate's world (unittest.mock) need mode inside, which is not built"
        )
    if not job.tests.strip():
        raise BadCode("tests are empty; without tests use Execute")
    if job.form in ("check", "calls") and not job.entry_point:
        raise BadCode(f"the form {job.form} needs an entry_point")
    if not 0 <= job.tolerance < 1:
        raise BadCode(f"tolerance={job.tolerance} is out of range; allowed are 0 (exact) to below 1")
    if job.tolerance and job.form != "calls":
        raise UnsupportedOption(f"tolerance has no effect with the form {job.form}; leave it out")
    if job.stdin or job.expected_stdout:
        raise UnsupportedOption(f"stdin and expected_stdout have no effect with the form {job.form}")
    names = job.names
    if not names or len(names) > EXPORTS_MAX or not all(name.isidentifier() for name in names):
        raise BadCode(f"entry_point and exports must be 1 to {EXPORTS_MAX} identifiers; got {len(names)}")


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise BadCode(f"{name} has {size} bytes or characters; at most {limit} are accepted")
